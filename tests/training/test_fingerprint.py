"""Claim: a checkpoint carries the loss of a fixed batch, and a state that gives another one is not trained on.

Run: pytest tests/training/test_fingerprint.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.errors import UserError
from slope_dist.training import fingerprint
from tests.distributed import end_ranks, run_ranks
from tests.runs import newest, pretrain, train, watch_engines, write_config

SAME = {"engine": "deepspeed", "tensor": 1}


def made(loss: float | None, dtype: str = "fp32", **made_by: Any) -> dict[str, Any]:
    return {"loss": loss, "tolerance": fingerprint.TOLERANCE[dtype], "made_by": {**SAME, **made_by}}


def test_the_same_layout_gives_the_same_loss_to_the_last_bit() -> None:
    fingerprint.compare(made(5.25), made(5.25), "here")
    with pytest.raises(UserError, match=r"here: its state gives a loss of 5.250000000000001 .* gave 5.25 .*exactly"):
        fingerprint.compare(made(5.25), made(5.250000000000001), "here")


@pytest.mark.parametrize(
    ("stored", "found", "passes"),
    [
        (made(5.0), made(5.00004, tensor=2), True),
        (made(5.0), made(5.00006, tensor=2), False),
        (made(5.0, "bf16"), made(5.03, "bf16", tensor=2), True),
        (made(5.0, "bf16"), made(5.05, "bf16", tensor=2), False),
        # Who goes on in another precision rounds by the coarser of the two.
        (made(5.0, "bf16", precision="bf16"), made(5.03, precision="fp32"), True),
        (made(5.0), made(None, tensor=2), False),
        # Another processor rounds in its own way.
        (made(5.0, cpu="AVX2"), made(5.0 * (1 + 2.0**-20), cpu="AVX512"), True),
        (made(5.0, cpu="AVX2"), made(5.0 * (1 + 2.0**-20), cpu="AVX2"), False),
        # Compiled, the order of sums may differ between two starts of one layout.
        (made(5.0, compile=True), made(5.00004, compile=True), True),
        (made(5.0, compile=True), made(5.00006, compile=True), False),
        (made(5.0), made(5.00004, compile=True), True),
        # And so may the kernels that were the fastest ones.
        (made(5.0, kernels="measured"), made(5.00004, kernels="measured"), True),
        (made(5.0, kernels="measured"), made(5.00006, kernels="measured"), False),
    ],
)
def test_another_layout_gives_it_to_the_precisions_tolerance(stored: Any, found: Any, passes: bool) -> None:
    if passes:
        fingerprint.compare(stored, found, "here")
    else:
        with pytest.raises(UserError, match="does not compute what the one that wrote it did"):
            fingerprint.compare(stored, found, "here")


def test_a_loss_that_was_not_finite_shows_nothing_and_must_not_become_finite_by_itself() -> None:
    said = fingerprint.compare(made(None), made(None), "here")
    assert said is not None and "here: its state gave no finite loss on the fixed batch when it was saved, and" in said
    said = fingerprint.compare(made(None), made(5.0, tensor=2), "here")
    assert said is not None and "and gives 5.0 here" in said
    with pytest.raises(UserError, match=r"gives a loss of 5\.0 on the fixed batch, and gave no finite number when"):
        fingerprint.compare(made(None), made(5.0), "here")
    with pytest.raises(UserError, match=r"gives a loss of no finite number on the fixed batch, and gave 5\.0 when"):
        fingerprint.compare(made(5.0), made(None), "here")


def trained_without_a_finite_loss(config: str) -> int:
    """Train with a validation split whose first windows overflow."""

    def spoil(module: Any, arguments: Any, y: torch.Tensor) -> torch.Tensor:
        return y if module.training else y * float("inf")

    watch_engines(
        lambda event, engine, _: engine.module.layers[2].down.register_forward_hook(spoil) if event == "built" else None
    )
    return pretrain("--config", config)


def test_a_fixed_batch_that_is_not_finite_keeps_no_run_from_being_saved_or_resumed(
    corpus: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint__interval": 1, "evaluation__interval": 0}
    path = write_config(tmp_path, corpus, training__steps=3, **settings)
    ends = {}
    for start in ("first", "again"):
        [ended] = end_ranks(trained_without_a_finite_loss, 1, str(path), process_group=False)
        assert ended.code == 0, ended
        ends[start] = ended.output + ended.errors
        if start == "first":
            assert newest(tmp_path / "run").scalars["fingerprint"]["loss"] is None
            (tmp_path / "run/checkpoints/step-00000003").rename(tmp_path / "later")
    warning = "warning: the loss of the fixed batch, the first 2 windows of the validation split, is not finite"
    assert ends["first"].count(warning) == 1
    assert "step-00000002: its state gave no finite loss on the fixed batch when it was saved" in ends["again"]
    assert newest(tmp_path / "run").step == 3


def resumed_with_a_wrong_kernel(config: str, factor: float) -> str:
    """Resume where a linear of block 1 gives `factor` times too much; returns the refusal."""

    def watch(event: str, engine: Any, _: Any) -> None:
        if event == "built":
            engine.module.layers[2].down.register_forward_hook(lambda module, arguments, y: y * factor)

    watch_engines(watch)
    try:
        train(config)
    except UserError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_program_that_computes_something_else_is_refused(ranks: int, corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, training__steps=2, checkpoint__interval=1))
    run_ranks(train, 1, path)
    stored = newest(tmp_path / "run").scalars["fingerprint"]
    assert 5 < stored["loss"] < 7 and stored["made_by"]["torch"] == str(torch.__version__)
    path = str(write_config(tmp_path, corpus, training__steps=3, adapters__rank=8, checkpoint__interval=1))
    (tmp_path / "run/checkpoints/step-00000002").rename(tmp_path / "later")
    # Of one rank, in the layout of before, nothing is too little.
    for said in run_ranks(resumed_with_a_wrong_kernel, ranks, path, 1 + 2.0**-10 if ranks == 1 else 1.5):
        assert "step-00000001: its state gives a loss of " in said, said
