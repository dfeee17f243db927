"""A layout that cannot be is refused in one line by a dry run and by every rank of a launch, before anything is made.

Run alone: pytest tests/config/test_refusals.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Outcome, end_ranks
from tests.runs import pretrain, write_config

# Two layers, four heads, hidden 32, feed-forward 64, sequences of 16 unless said otherwise.
IMPOSSIBLE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "heads": ({"parallel__tensor": 3}, ("model.num_heads 4", "parallel.tensor 3", "parallel.tensor 2 would fit")),
    "hidden size inside a group": (
        {"parallel__tensor": 2, "model__hidden_size": 24},
        ("model.hidden_size 24", "multiple of 2 x 8 = 16, such as 16 or 32", "parallel.tensor 1 would fit"),
    ),
    "feed-forward inside a group": (
        {"parallel__tensor": 2, "model__ffn_size": 72},
        ("model.ffn_size 72", "parallel.tensor 2", "such as 64 or 80"),
    ),
    "group of another pattern": (
        {"parallel__tensor": 2, "model__ffn_size": 72, "sparsity": {"pattern": "2:8"}},
        ("model.ffn_size 72", "inside a group of 8", "such as 64 or 80"),
    ),
    "stages without a layer": (
        {"parallel__pipeline": 3},
        ("parallel.pipeline 3", "model.num_layers 2", "parallel.pipeline 2 is the most"),
    ),
    "pipeline with ZeRO 2": (
        {"parallel__pipeline": 2, "parallel__zero_stage": 2},
        ("parallel.zero_stage 2", "parallel.pipeline 2", "use parallel.zero_stage 1 or 0"),
    ),
    "pipeline with ZeRO 3": (
        {"parallel__pipeline": 2, "parallel__zero_stage": 3},
        ("parallel.zero_stage 3", "parallel.pipeline 2", "or parallel.pipeline 1"),
    ),
    "pipeline with fsdp": (
        {"parallel__pipeline": 2, "parallel__engine": "fsdp"},
        ("parallel.pipeline 2", 'parallel.engine "fsdp"', "use parallel.pipeline 1"),
    ),
    "sequence": (
        {"parallel__tensor": 2, "parallel__sequence_parallel": True, "model__sequence_length": 15},
        ("model.sequence_length 15", "parallel.tensor 2", "parallel.sequence_parallel"),
    ),
    "resident under ZeRO 3": (
        {"parallel__zero_stage": 3, "sparsity": {"backward_weight": "resident"}},
        ('sparsity.backward_weight "resident"', "parallel.zero_stage 3", 'use "auto" or "derived"'),
    ),
    "resident under fsdp": (
        {"parallel__engine": "fsdp", "sparsity": {"backward_weight": "resident"}},
        ('sparsity.backward_weight "resident"', 'parallel.engine "fsdp"', 'use "auto" or "derived"'),
    ),
    "compiled under ZeRO 3": (
        {"parallel__zero_stage": 3, "training__compile": True},
        ("training.compile true", "parallel.zero_stage 3", 'parallel.engine "fsdp"'),
    ),
    "fp16 under fsdp": (
        {"parallel__engine": "fsdp", "precision": "fp16"},
        ('precision "fp16"', 'parallel.engine "fsdp"', 'use precision "bf16"'),
    ),
}
# Only a launch knows how many ranks there are: two.
IMPOSSIBLE_FOR_TWO: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "more than the ranks": (
        {"parallel__tensor": 2, "parallel__pipeline": 2},
        ("parallel.tensor 2 x parallel.pipeline 2 = 4 does not divide the 2 ranks launched", "launch 4"),
    ),
    "data ranks": (
        {"parallel__tensor": 2, "parallel__data": 2},
        ("parallel.tensor 2 x parallel.pipeline 1 x parallel.data 2 = 4 ranks, but 2 were launched", "launch 4"),
    ),
    "batch": (
        {"training__global_batch_size": 9, "training__micro_batch_size": 1},
        ("training.global_batch_size 9", "1 x 2 data ranks", "a multiple of 2"),
    ),
}


def entry_point(*arguments: str) -> None:
    raise SystemExit(pretrain(*arguments))


def call(*arguments: str, ranks: int) -> list[Outcome]:
    return end_ranks(entry_point, ranks, *arguments, process_group=False, timeout=60)


def assert_one_line(outcome: Outcome, said: tuple[str, ...]) -> None:
    lines = outcome.errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.errors
    assert [part for part in said if part not in lines[0]] == [], lines[0]
    assert len(lines[0]) < 500


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_layout_that_cannot_be(name: str, tmp_path: Path) -> None:
    changes, said = IMPOSSIBLE[name]
    path = str(write_config(tmp_path, tmp_path, **changes))
    [dry] = call("--config", path, "--dry-run", ranks=1)
    assert dry.code == 2 and dry.output == ""
    assert_one_line(dry, (path, *said))
    first, second = call("--config", path, ranks=2)
    assert (first.code, second.code) == (2, 2)
    assert_one_line(first, (path, *said))
    assert (first.output, second.output, second.errors) == ("", "", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", IMPOSSIBLE_FOR_TWO)
def test_a_layout_that_two_ranks_cannot_have(name: str, tmp_path: Path) -> None:
    changes, said = IMPOSSIBLE_FOR_TWO[name]
    path = str(write_config(tmp_path, tmp_path, **changes))
    [dry] = call("--config", path, "--dry-run", ranks=1)
    assert dry.code == 0, dry.errors
    first, second = call("--config", path, ranks=2)
    assert (first.code, second.code) == (2, 2)
    assert_one_line(first, said)
    assert (first.output, second.output, second.errors) == ("", "", "")
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_is_noted_by_the_dry_run(tmp_path: Path) -> None:
    changes = {"parallel": {"engine": "fsdp", "zero_stage": 2, "sequence_parallel": True}}
    [dry] = call("--config", str(write_config(tmp_path, tmp_path, **changes)), "--dry-run", ranks=1)
    assert dry.code == 0, dry.errors
    notes = [line for line in dry.output.splitlines() if line.startswith("note: ")]
    assert [line.split()[1] for line in notes] == ["parallel.zero_stage", "parallel.sequence_parallel"]
