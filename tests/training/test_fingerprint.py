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
from tests.distributed import run_ranks
from tests.runs import newest, train, watch_engines, write_config

SAME = {"engine": "deepspeed", "tensor": 1}


def made(loss: float, dtype: str = "fp32", **made_by: Any) -> dict[str, Any]:
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
        (made(5.0), made(float("nan"), tensor=2), False),
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
