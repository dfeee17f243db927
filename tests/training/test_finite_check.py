"""Nothing that is not finite reaches a weight, on any rank: the step is skipped, counted, and after three the run ends.

The spoilt gradient or loss is always one rank's alone. Fp16 runs on the CPU under an accelerator of DeepSpeed's that
says it can, so that DeepSpeed's own loss scaler does the work.

Run: pytest tests/training/test_finite_check.py
"""

from __future__ import annotations

import re
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from slope_dist.config import load_config
from slope_dist.engine import StepResult
from slope_dist.training.guards import FiniteGuard, RunFailedError
from tests.distributed import end_ranks, run_ranks
from tests.engine.oracle import plain_run
from tests.runs import (
    FP16,
    STEPS,
    allow_fp16,
    cut_off,
    heal,
    newest,
    pretrain,
    spoil,
    spoilt_run,
    step_rows,
    watch_engines,
    write_config,
)
from tests.same_run import BF16


def spoilt_entry_point(config: str, how: str, steps: list[int]) -> None:
    """As `spoilt_run`, through the entry point, whose exit code is the process's."""
    if load_config(config).precision == "fp16":
        allow_fp16()

    def watch(event: str, engine: Any, step: Any) -> None:
        if event == "before step" and step in steps:
            spoil(engine, how)
        if event == "after step":
            heal(engine)

    watch_engines(watch)
    raise SystemExit(pretrain("--config", config))


def entry_point(config: str) -> None:
    """The entry point as it is."""
    raise SystemExit(pretrain("--config", config))


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        *((stage, "nan gradient") for stage in (0, 2, 3)),
        *((stage, "inf loss") for stage in (0, 3)),
        *(pytest.param(1, how, marks=pytest.mark.slow) for how in ("nan gradient", "inf loss")),
    ],
)
def test_bad_step_of_one_rank_changes_nothing_anywhere(stage: int, how: str, corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, parallel__zero_stage=stage))
    ranks = run_ranks(spoilt_run, 2, path, how, [4, 8])
    assert [rank["unchanged"] for rank in ranks] == [[4, 8], [4, 8]]
    rows = step_rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {4: "non-finite", 8: "non-finite"}
    assert all(row["grad_norm"] is None for row in rows if "skipped" in row)
    [plain] = run_ranks(plain_run, 1, path, [4, 8])
    for row, loss in zip(rows, plain["losses"], strict=True):
        bad = row["step"] in (4, 8) and how == "inf loss"
        assert row["loss"] is None if bad else abs(row["loss"] - loss) <= 1e-5 * loss, row
    checkpoint = newest(tmp_path / "run")
    assert checkpoint.scalars["skipped_steps"] == 2
    assert checkpoint.scalars["optimizer_steps"]["decay"] == STEPS - 2


@pytest.mark.parametrize("gradient_dtype", ["fp32", "model"])
def test_bad_step_of_one_rank_changes_nothing_anywhere_in_bf16(
    gradient_dtype: str, corpus: Path, tmp_path: Path
) -> None:
    path = str(write_config(tmp_path, corpus, precision="bf16", parallel__gradient_dtype=gradient_dtype))
    ranks = run_ranks(spoilt_run, 2, path, "nan gradient", [4, 8])
    assert [rank["unchanged"] for rank in ranks] == [[4, 8], [4, 8]]
    rows = step_rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {4: "non-finite", 8: "non-finite"}
    [plain] = run_ranks(plain_run, 1, path, [4, 8])
    for row, loss in zip(rows, plain["losses"], strict=True):
        assert abs(row["loss"] - loss) <= BF16 * loss, row
    assert newest(tmp_path / "run").scalars["optimizer_steps"]["decay"] == STEPS - 2


def test_bad_steps_in_a_row_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, checkpoint__interval=2))
    [outcome] = end_ranks(spoilt_entry_point, 1, path, "inf gradient", [2, 4, 5, 6], process_group=False)
    assert outcome.code == 1
    lines = outcome.errors.strip().splitlines()
    assert len(lines) == 2, outcome.errors
    # The guard counts in a row: step 2 was bad too, and step 3 was not.
    assert lines[0].startswith("error: ") and "3 steps in a row" in lines[0]
    assert "step 6" in lines[0] and "samples 40 to 47" in lines[0]
    assert str(tmp_path / "run" / "checkpoints" / "step-00000004") in lines[1]
    # A virtual environment made by that of another may name its version too.
    assert re.search(rf"/python[\d.]* launch/pretrain\.py --config {re.escape(path)}$", lines[1]), lines[1]
    [again] = end_ranks(entry_point, 1, path, process_group=False)
    assert again.code == 0, again.errors
    # The checkpoint remembers the bad steps before it: 2 and 4.
    assert newest(tmp_path / "run").scalars["skipped_steps"] == 2


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_overflow_above_the_smallest_scale_is_the_scalers_affair(stage: int, corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, **FP16, parallel__zero_stage=stage))
    # Scales 8, 4, 2 are lost to overflows in a row, more than the guard allows; it does not count them.
    ranks = run_ranks(spoilt_run, 2, path, "inf gradient", [2, 3, 4, 7])
    for rank in ranks:
        assert rank["unchanged"] == [2, 3, 4, 7]
        assert rank["scales"] == [8, 4, 2, 1, 1, 1, 1, 1, 1, 1]
    skipped = {row["step"]: row["skipped"] for row in step_rows(tmp_path / "run") if "skipped" in row}
    assert skipped == {2: "loss scale", 3: "loss scale", 4: "loss scale", 7: "non-finite"}
    assert newest(tmp_path / "run").scalars["skipped_steps"] == 1


def test_overflows_at_the_smallest_scale_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, **FP16))
    arguments = (path, "nan gradient", list(range(1, 11)))
    [outcome] = end_ranks(spoilt_entry_point, 1, *arguments, process_group=False)
    assert outcome.code == 1
    assert "3 steps in a row" in outcome.errors and "step 6" in outcome.errors
    assert "Traceback" not in outcome.errors


def test_loss_scale_is_resumed(corpus: Path, tmp_path: Path) -> None:
    changes = FP16 | {"loss_scale__window": 3, "checkpoint__interval": 4, "checkpoint__keep": 9}
    path = str(write_config(tmp_path / "a", corpus, **changes))
    [whole] = run_ranks(spoilt_run, 1, path, "inf gradient", [2])
    assert len(set(whole["scales"])) > 2, "the scale is meant to fall and to rise"
    cut = str(write_config(tmp_path / "b", corpus, **changes))
    run_ranks(spoilt_run, 1, cut, "inf gradient", [2])
    cut_off(tmp_path / "b/run", 4)
    [rest] = run_ranks(spoilt_run, 1, cut, "inf gradient", [])
    assert rest["scales"] == whole["scales"][4:]
    losses = [row["loss"] for row in step_rows(tmp_path / "a/run")]
    assert [row["loss"] for row in step_rows(tmp_path / "b/run")] == losses


def test_fp16_is_refused_in_one_line_where_deepspeed_cannot(corpus: Path, tmp_path: Path) -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed can do fp16 on this machine: GPUs can, and so can some CPUs")
    path = str(write_config(tmp_path, corpus, precision="fp16"))
    [outcome] = end_ranks(entry_point, 1, path, process_group=False)
    assert outcome.code == 2
    assert outcome.errors.startswith('error: precision "fp16"') and '"bf16"' in outcome.errors
    assert len(outcome.errors.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_guard_counts_only_its_own_and_only_in_a_row() -> None:
    guard = FiniteGuard(limit=2)
    good = StepResult(loss=1.0, grad_norm=1.0, skipped=None)
    bad = StepResult(loss=float("nan"), grad_norm=float("nan"), skipped="non-finite")
    scale = StepResult(loss=1.0, grad_norm=float("inf"), skipped="loss scale")
    for step, result in enumerate([bad, good, bad, good, scale, scale, scale, bad], 1):
        guard.check(step, result, (0, 1))
    assert (guard.skipped, guard.in_a_row) == (3, 1)
    with pytest.raises(RunFailedError, match=r"2 steps in a row.*step 9.*samples 64 to 71"):
        guard.check(9, bad, (64, 71))
    assert isnan(bad.loss)
