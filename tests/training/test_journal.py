"""metrics.jsonl is cut back to the resumed step, survives a half-written line, and is JSON whatever the numbers are.

Run: pytest tests/training/test_journal.py
"""

from __future__ import annotations

import json
import time
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from slope_dist.config import load_config
from slope_dist.training.evaluation import Evaluation
from slope_dist.training.folder import RunFolder, read_rows
from slope_dist.training.journal import Journal, finite
from tests.runs import write_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(load_config(write_config(tmp_path, tmp_path)))
    made.path.mkdir()
    return made


def step_row(step: int, loss: float | None = 5.0) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "lr": 0.1,
        "grad_norm": None,
        "tokens": 8 * step,
        "tokens_per_second": 1.5,
        "phase": "sparse" if step < 3 else "adapters",
    }


def fill(folder: RunFolder, steps: int) -> None:
    journal = Journal(folder, 0)
    for step in range(1, steps + 1):
        journal.step(step_row(step))
        journal.evaluation(step, Evaluation(loss=4.0, bytes_per_token=None))
    journal.close()


def test_rows_after_the_resumed_step_are_cut_off(folder: RunFolder) -> None:
    fill(folder, 4)
    journal = Journal(folder, 2)
    assert [row["step"] for row in journal.rows] == [1, 1, 2, 2]
    journal.step(step_row(3))
    journal.close()
    assert [row["step"] for row in read_rows(folder.metrics)] == [1, 1, 2, 2, 3]
    fill(folder, 1)
    assert [row["step"] for row in read_rows(folder.metrics)] == [1, 1]


@pytest.mark.parametrize("torn", ["{", '{"step": 3, "loss": 1', '{"step": 3, "loss": NaN', "\x00\x00"])
def test_half_written_last_line_is_dropped(folder: RunFolder, torn: str) -> None:
    fill(folder, 2)
    with folder.metrics.open("a") as file:
        file.write(torn)
    journal = Journal(folder, 2)
    journal.step(step_row(3))
    journal.close()
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3]


def test_an_evaluation_done_again_is_one_row_also_where_a_late_save_came_between(folder: RunFolder) -> None:
    fill(folder, 2)
    journal = Journal(folder, 2)
    journal.problem(1, "what a save of step 1 met after step 2")
    journal.evaluation(2, Evaluation(loss=4.0, bytes_per_token=None))
    journal.evaluation(2, Evaluation(loss=3.0, bytes_per_token=None))
    journal.close()
    found = [row["eval_loss"] for row in read_rows(folder.metrics) if row["step"] == 2 and "eval_loss" in row]
    assert found == [4.0, 3.0]


def test_every_row_is_on_disk_at_once(folder: RunFolder) -> None:
    journal = Journal(folder, 0)
    for step in (1, 2):
        journal.step(step_row(step))
        assert len(read_rows(folder.metrics)) == step
    journal.close()


def test_what_is_not_finite_becomes_null(folder: RunFolder) -> None:
    assert [finite(value) for value in (nan, inf, -inf, 0.0, -1.5)] == [None, None, None, 0.0, -1.5]
    journal = Journal(folder, 0)
    journal.step(step_row(1, loss=finite(nan)))
    journal.evaluation(1, Evaluation(loss=nan, bytes_per_token=2.0, corpora={"a": Evaluation(4.0, None)}))
    with pytest.raises(ValueError, match="JSON"):
        journal.step(step_row(2, loss=nan))
    journal.close()
    rows = read_rows(folder.metrics)
    assert rows[0]["loss"] is None
    numbers = {"eval_loss": None, "perplexity": None, "bits_per_byte": None}
    alone = {"eval_loss": 4.0, "perplexity": pytest.approx(54.598150), "bits_per_byte": None}
    written = rows[1].pop("time")
    assert time.time() - 60 < written <= time.time()
    assert rows[1] == {"step": 1, **numbers, "corpora": {"a": alone}}


def test_picture_is_a_png_also_of_rows_without_numbers(folder: RunFolder) -> None:
    journal = Journal(folder, 0)
    journal.draw("nothing yet")
    empty = folder.picture.read_bytes()
    journal.step(step_row(1, loss=None))
    for step in range(2, 6):
        journal.step(step_row(step, loss=6.0 - step / 2))
    journal.evaluation(5, Evaluation(loss=4.0, bytes_per_token=3.5))
    journal.draw("a run")
    drawn = folder.picture.read_bytes()
    journal.close()
    assert empty.startswith(b"\x89PNG") and drawn.startswith(b"\x89PNG")
    assert drawn != empty
    assert list(folder.path.glob(".*partial")) == []
    assert list(folder.path.glob("events.out.tfevents.*"))


def test_mfu_is_drawn_where_there_is_one(folder: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(folder, 0)
    journal.step(step_row(1))
    journal.step(step_row(2) | {"mfu": 0.25})
    journal.close()
    events = EventAccumulator(str(folder.path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/mfu")] == [(2, 0.25)]
