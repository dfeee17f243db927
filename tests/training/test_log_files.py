"""Claim: a disk that takes nothing for a while ends no run, and leaves no row out of metrics.jsonl and none half there.

A limit on the size of files stands for the full disk: as there, a write is taken in part before one fails.

Run: pytest tests/training/test_log_files.py
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slope_dist.training import log_files
from slope_dist.training.log_files import Board, RowFile
from slope_dist.training.plot import plot_losses
from tests.distributed import end_ranks, run_ranks
from tests.runs import STEPS, pretrain, rows_of, step_rows, watch_engines, write_config


@contextmanager
def full(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lines(first: int, last: int) -> list[str]:
    return [json.dumps({"step": step, "text": "x" * 50}) for step in range(first, last + 1)]


def write_rows(folder: str) -> list[str]:
    said: list[str] = []
    path = Path(folder) / "metrics.jsonl"
    file = RowFile(path, said.append)
    for line in lines(1, 3):
        file.write(line + "\n")
    for _ in range(2):
        with full(path.stat().st_size + 100):
            # Of the second of them a part fits.
            for line in lines(4, 6):
                file.write(line + "\n")
            assert path.read_text().splitlines() == lines(1, 4), "half a line"
            assert file.waits
        file.write(lines(7, 7)[0] + "\n")
        assert path.read_text().splitlines() == lines(1, 7)
        path.write_text("".join(line + "\n" for line in lines(1, 3)))
        file.close()
        file = RowFile(path, said.append)
    return said


def test_what_waits_is_written_in_order_and_said_once(tmp_path: Path) -> None:
    [said] = run_ranks(write_rows, 1, str(tmp_path))
    assert said[0].startswith(
        "warning: metrics.jsonl cannot be written (File too large): its rows, 100,000 at most, wait"
    )
    assert said[1] == "metrics.jsonl is written again: no rows are missing"
    assert said[2:] == said[:2]


def test_a_half_line_that_could_not_be_taken_back_is_when_the_file_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = RowFile(path, print)
    file.write("1\n")
    file._release()
    with path.open("a") as other:
        other.write("ha")
    file.write("2\n")
    assert path.read_text() == "1\n2\n"
    # And where somebody has moved the file, there is another.
    file._release()
    path.rename(tmp_path / "moved")
    file.write("3\n")
    file.close()
    assert path.read_text() == "3\n"


def test_rows_that_wait_are_bounded_and_those_left_out_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "KEPT", 3)
    said: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()
    file = RowFile(folder / "metrics.jsonl", said.append)
    file._release()
    folder.rename(tmp_path / "away")
    for step in range(5):
        file.write(f"{step}\n")
    (tmp_path / "away").rename(folder)
    file.write("5\n")
    assert (folder / "metrics.jsonl").read_text() == "3\n4\n5\n"
    assert said[-1] == "metrics.jsonl is written again: 3 rows are missing"
    file._release()
    folder.rename(tmp_path / "away")
    file.write("6\n")
    file.close()
    assert said[-1] == "warning: 1 rows are missing in metrics.jsonl"


def write_events(folder: str) -> list[str]:
    said: list[str] = []
    log_files.PAUSE = 0.0
    board = Board(Path(folder), 1, said.append)
    board.add({"a": 1.0}, 1, disk_is_well=True)
    with full(0):
        for step in range(2, 60):
            board.add({"a": 1.0, "b": None}, step, disk_is_well=False)
    # What is in the way of metrics.jsonl is in the way here too.
    board.add({"a": 1.0}, 60, disk_is_well=False)
    board.add({"a": 1.0}, 61, disk_is_well=True)
    board.close()
    return said


def test_tensorboard_goes_on_in_a_new_file_when_its_thread_has_died(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [said] = run_ranks(write_events, 1, str(tmp_path))
    assert [line.split(" (")[0] for line in said] == [
        "warning: TensorBoard's event file cannot be written",
        "TensorBoard's event file is written again: its last events before that, and those until now, are missing",
    ]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    steps = [event.step for event in events.Scalars("a")]
    assert steps[-1] == 61 and 60 not in steps


def draw(folder: str) -> str:
    path = Path(folder) / "loss.png"
    rows = [{"step": 1, "loss": 5.0, "phase": "sparse"}]
    plot_losses(rows, path, "before")
    before = path.read_bytes()
    with full(100):
        for _ in range(2):
            with pytest.raises(OSError):
                plot_losses(rows, path, "full")
    assert path.read_bytes() == before
    assert list(Path(folder).iterdir()) == [path]
    from matplotlib import pyplot

    return str(pyplot.get_fignums())


def test_a_picture_without_room_leaves_the_one_before(tmp_path: Path) -> None:
    assert run_ranks(draw, 1, str(tmp_path)) == ["[]"]


def run_on_a_full_disk(config: str) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(event: str, engine: object, step: object) -> None:
        if event == "before step" and step in (3, 8):
            # The output is such a file too.
            resource.setrlimit(resource.RLIMIT_FSIZE, (600 if step == 3 else limit[0], limit[1]))

    watch_engines(watch)
    log_files.PAUSE = 0.0
    raise SystemExit(pretrain("--config", config))


def test_a_run_outlives_a_full_disk_and_every_row_of_it_is_there(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, evaluation__interval=2, run__log_interval=1)
    [outcome] = end_ranks(run_on_a_full_disk, 1, str(config), process_group=False)
    assert outcome.code == 0, outcome.errors
    assert [row["step"] for row in step_rows(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows_of(tmp_path / "run") if "eval_loss" in row] == list(range(2, STEPS + 1, 2))
    assert json.loads((tmp_path / "run/end.json").read_text())["how"] == "finished"
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
