"""A run may go on in another precision: its fp32 truth is then the checkpoint's, to the last bit.

What holds the truth is the master in bf16 and the weight itself in fp32. Both directions, into ZeRO 0, 1 and 3 and
FSDP, with the adapters on; the checkpoints are of ZeRO 1.

Run: pytest tests/training/test_precision_change.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.runs import newest, read_all, same_bits, step_rows, train, watch_engines, write_config

STEPS = 4
TRUTH = {"bf16": "master", "fp32": "weight"}


def resumed_run(config: str) -> dict[str, Any]:
    """Train on from the newest checkpoint; this rank's state, whole tensors, as it was loaded."""
    loaded: dict[str, Tensor] = {}
    steps: dict[str, int] = {}

    def watch(event: str, engine: Any, _: Any) -> None:
        if event == "loaded":
            fragments, scalars = engine.export_state()
            parts: dict[str, list[Any]] = {}
            for fragment in fragments:
                parts.setdefault(f"{fragment.kind}/{fragment.name}", []).append(fragment)
            for key, pieces in parts.items():
                pieces.sort(key=lambda piece: piece.start)
                loaded[key] = torch.cat([piece.tensor for piece in pieces]).view(pieces[0].shape)
            steps.update(scalars["optimizer_steps"])

    watch_engines(watch)
    train(config, accept_steps=True)
    return {"state": loaded, "steps": steps}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp(precision)
            path = write_config(made[precision], corpus, precision=precision, training__steps=STEPS)
            run_ranks(train, 1, str(path))
        return made[precision] / "run"

    return make


@pytest.mark.parametrize(
    ("before", "after", "into"),
    # ZeRO 0 in bf16 is ZeRO 1.
    [
        *(("bf16", "fp32", into) for into in ("zero 0", "zero 1", "zero 3", "fsdp")),
        *(("fp32", "bf16", into) for into in ("zero 1", "zero 3", "fsdp")),
    ],
)
def test_the_fp32_truth_crosses_a_change_of_precision(
    before: str, after: str, into: str, trained: Callable, corpus: Path, tmp_path: Path
) -> None:
    parallel: dict[str, Any] = {"engine": "fsdp"}
    if into != "fsdp":
        parallel = {"zero_stage": int(into.removeprefix("zero ")), "zero3_persistence_threshold": 0}
    path = write_config(tmp_path, corpus, precision=after, parallel=parallel, training__steps=STEPS + 1)
    shutil.copytree(trained(before), tmp_path / "run")
    checkpoint = newest(tmp_path / "run")
    there = {kind: read_all(checkpoint, kind) for kind in (TRUTH[before], "exp_avg", "exp_avg_sq", "metadata")}
    weights = read_all(checkpoint, "weight")
    [found] = run_ranks(resumed_run, 1, str(path))

    here: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found["state"].items():
        kind, name = key.split("/")
        here.setdefault(kind, {})[name] = tensor
    truth = here[TRUTH[after]]
    assert {tensor.dtype for tensor in truth.values()} == {torch.float32}
    assert any("adapter" in name for name in truth)
    for kind, expected in there.items():
        mine = truth if kind == TRUTH[before] else here[kind]
        assert mine.keys() == expected.keys()
        assert [name for name in expected if not same_bits(mine[name], expected[name])] == [], kind
    assert found["steps"] == checkpoint.scalars["optimizer_steps"]
    if before == "bf16":
        # Were the rounded weights taken instead, this test would see it.
        assert any(not torch.equal(weights[name].float(), truth[name]) for name in truth)
    else:
        assert all(same_bits(here["weight"][name], truth[name].bfloat16()) for name in truth)
    assert [row["step"] for row in step_rows(tmp_path / "run")] == list(range(1, STEPS + 2))
