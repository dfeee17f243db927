"""Layers may have patterns of their own (arXiv 2405.16325, table 4.5): such a run trains, is the same in every layout,
goes on from its checkpoints, and these are read for what they are.

Run: pytest tests/training/test_layer_patterns.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from slope_dist.checkpoint.inspection import measure_layers
from slope_dist.checkpoint.validation import check_state
from tests.distributed import run_ranks
from tests.runs import STEPS, newest, relative, step_rows, train, write_config

LAYERS = 4
CHANGES: dict[str, Any] = {
    "model__num_layers": LAYERS,
    # The first half 2:4, the second 2:8, but for the last linear of all.
    "sparsity__layer_patterns": ["decoder.layers.3.fc2=4:8", "decoder.layers.[23].*=2:8"],
    "checkpoint__interval": 4,
    "checkpoint__keep": 5,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel__tensor": 2},
    "fsdp": {"parallel__engine": "fsdp"},
}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("patterns")
    run_ranks(train, 1, str(write_config(folder, corpus, **CHANGES)))
    return folder / "run"


def expected_pattern(name: str) -> str:
    if name == "decoder.layers.3.fc2":
        return "4:8"
    return "2:8" if name.startswith(("decoder.layers.2.", "decoder.layers.3.")) else "2:4"


def test_each_layer_has_its_pattern(whole: Path) -> None:
    checkpoint = newest(whole)
    check_state(checkpoint)
    pruned = [numbers for numbers in measure_layers(checkpoint) if numbers.layer.pattern is not None]
    assert len(pruned) == 6 * LAYERS - 3
    for numbers in pruned:
        pattern = numbers.layer.pattern
        assert pattern is not None and str(pattern) == expected_pattern(numbers.layer.name)
        assert numbers.kept == numbers.entries * pattern.density


def test_it_learns(whole: Path) -> None:
    losses = [row["loss"] for row in step_rows(whole)]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_same_run_in_every_layout(layout: str, whole: Path, corpus: Path, tmp_path: Path) -> None:
    run_ranks(train, 2, str(write_config(tmp_path, corpus, **CHANGES | LAYOUTS[layout])))
    rows, expected = step_rows(tmp_path / "run"), step_rows(whole)
    assert len(rows) == len(expected) == STEPS
    for mine, other in zip(rows, expected, strict=True):
        assert relative(mine["loss"], other["loss"]) <= 1e-5, mine["step"]
        assert relative(mine["grad_norm"], other["grad_norm"]) <= 1e-4, mine["step"]


def test_it_goes_on_to_the_same_bits(whole: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    # As if it had been killed after step 9: that of step 8 is the newest there is.
    shutil.rmtree(tmp_path / "run/checkpoints" / newest(whole).path.name)
    run_ranks(train, 1, str(write_config(tmp_path, corpus, **CHANGES)))
    assert newest(tmp_path / "run").manifest.files == newest(whole).manifest.files
    assert [row["loss"] for row in step_rows(tmp_path / "run")] == [row["loss"] for row in step_rows(whole)]
