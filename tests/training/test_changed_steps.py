"""Claim: `training.steps` may change until the adapters have joined; after that only if it is said to be meant, and
then they stay on.

Run: pytest tests/training/test_changed_steps.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from slope_dist.config import load_config
from slope_dist.training.folder import changed_settings
from tests.distributed import Outcome, end_ranks
from tests.runs import newest, pretrain, step_rows, write_config


def launched(config: str, *arguments: str) -> None:
    raise SystemExit(pretrain("--config", config, *arguments))


def run(config: Path, *arguments: str) -> Outcome:
    [outcome] = end_ranks(launched, 1, str(config), *arguments, process_group=False)
    return outcome


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    """A run of 4 steps, saved after each; the adapters join at the third."""
    path = write_config(tmp_path, corpus, training__steps=4, checkpoint__interval=1, checkpoint__keep=9)
    assert run(path).code == 0
    return path


def cut_back(config: Path, step: int) -> Path:
    run_folder = config.parent / "run"
    for path in (run_folder / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            path.rename(config.parent / path.name)
    return run_folder


def phases(folder: Path) -> list[str]:
    return [row["phase"] for row in step_rows(folder)]


def test_before_the_switch_another_number_of_steps_is_another_switch(config: Path) -> None:
    folder = cut_back(config, 1)
    outcome = run(config, "--set", "training.steps=8")
    assert outcome.code == 0, outcome.errors
    assert "note: goes on with other settings: training.steps 4 there, 8 here" in outcome.output
    assert phases(folder) == ["sparse"] * 4 + ["adapters"] * 4


def test_another_dtype_of_gradients_is_told_where_it_changes_anything(config: Path) -> None:
    there = load_config(str(config))
    changed = there.model_copy(update={"parallel": there.parallel.model_copy(update={"gradient_dtype": "model"})})
    assert changed_settings(there.model_dump(mode="json"), changed) == []
    there, changed = (each.model_copy(update={"precision": "bf16"}) for each in (there, changed))
    said = changed_settings(there.model_dump(mode="json"), changed)
    assert said == ["parallel.gradient_dtype fp32 there, model here"]


def test_before_the_switch_fewer_steps_may_make_it_due_at_once(config: Path) -> None:
    folder = cut_back(config, 2)
    assert run(config, "--set", "training.steps=3").code == 0
    assert phases(folder) == ["sparse", "sparse", "adapters"]


def test_adapters_that_join_later_than_planned_have_their_warm_up_from_there(config: Path) -> None:
    folder = cut_back(config, 2)
    values = ('learning_rate_policy="rewarm_adapters"', "peak_learning_rate=0.01", "warmup_steps=4", "fraction=0.9")
    changes = [text for value in values for text in ("--set", f"adapters.{value}")]
    outcome = run(config, "--set", "training.steps=8", *changes)
    assert outcome.code == 0, outcome.errors
    said = "note: the adapters were to join at step 2, which is done without them: they join at step 3"
    assert said in outcome.output
    assert phases(folder) == ["sparse", "sparse"] + ["adapters"] * 6
    rates = [row["lr_adapters"] for row in step_rows(folder)[2:6]]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert newest(folder).scalars["first_adapter_step"] == 3
    cut_back(config, 5)
    again = run(config, "--set", "training.steps=8", *changes)
    assert again.code == 0 and "were to join" not in again.output
    assert [row["lr_adapters"] for row in step_rows(folder)[2:6]] == rates


def test_after_the_switch_it_must_be_meant_and_the_adapters_stay(config: Path) -> None:
    folder = cut_back(config, 3)
    refused = run(config, "--set", "training.steps=8")
    assert refused.code == 2
    [line] = refused.errors.splitlines()
    assert "step-00000003 already has adapters, which joined for the last steps of 4, and" in line
    assert "training.steps asks for 8; restore it, or give --accept-steps" in line
    outcome = run(config, "--set", "training.steps=8", "--accept-steps")
    assert outcome.code == 0, outcome.errors
    assert phases(folder) == ["sparse", "sparse"] + ["adapters"] * 6
    assert newest(folder).scalars["first_adapter_step"] == 3
    assert newest(folder).scalars["optimizer_steps"]["adapters"] == 6
    # Once meant it is the run's, and need not be said again.
    again = run(config, "--set", "training.steps=8")
    assert again.code == 0 and "this run is finished after step 8" in again.output
