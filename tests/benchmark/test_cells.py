"""Each finished cell is in the results at once; a rerun goes on behind them, in the same setting alone.

Run: pytest tests/benchmark/test_cells.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.benchmark import cells, results
from slope_dist.benchmark.cells import Cell, NotMeasuredError
from slope_dist.benchmark.results import ResultFile
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.errors import UserError

FACTS = {"device": "a card", "kind": "cuda", "torch": "2", "commit": "abc", "vendors": {"library": "1"}, "time": "noon"}


class Measured:
    """Cells "a", "b", "c", the calls that measured them, and what one of them raises."""

    def __init__(self, **raised: BaseException) -> None:
        self.calls: list[str] = []
        self._raised = raised

    def cells(self) -> list[Cell]:
        return [Cell(key, lambda key=key: self._measure(key)) for key in "abc"]

    def _measure(self, key: str) -> dict[str, Any]:
        self.calls.append(key)
        if key in self._raised:
            raise self._raised[key]
        return {"number": ord(key)}


def run(measured: Measured, file: ResultFile, minutes: float | None = None) -> cells.Outcome:
    return cells.run(measured.cells(), file, minutes, lambda line: None)


def on_disk(path: Path) -> list[str]:
    return [row["cell"] for row in json.loads(path.read_text())["rows"]]


def test_an_interrupt_loses_the_running_cell_and_a_rerun_goes_on_behind(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        run(Measured(b=KeyboardInterrupt()), ResultFile(path, "gemm", FACTS))
    assert on_disk(path) == ["a"]
    again = Measured()
    outcome = run(again, ResultFile(path, "gemm", FACTS | {"time": "later"}))
    assert again.calls == ["b", "c"] and (outcome.measured, outcome.skipped, outcome.left) == (2, 1, 0)
    content = json.loads(path.read_text())
    assert [row["number"] for row in content["rows"]] == [97, 98, 99] and content["machine"] == FACTS
    assert list(tmp_path.iterdir()) == [path]


def test_every_cell_is_there_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    seen = []
    plan = [Cell(key, lambda: seen.append(on_disk(path) if path.exists() else []) or {}) for key in "abc"]
    cells.run(plan, ResultFile(path, "gemm", FACTS), None, lambda line: None)
    assert seen == [[], ["a"], ["a", "b"]]


def test_none_is_begun_that_would_not_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it took as long as the longest so far."""
    now = 0.0

    def measure(seconds: float) -> dict[str, Any]:
        nonlocal now
        now += seconds
        return {}

    monkeypatch.setattr(cells.time, "monotonic", lambda: now)
    plan = [Cell(str(index), lambda s=seconds: measure(s)) for index, seconds in enumerate((10, 20, 5, 5, 5))]
    path = tmp_path / "results.json"
    outcome = cells.run(plan, ResultFile(path, "gemm", FACTS), 1.0, lambda line: None)
    # At 40 s another 20 s would end too late.
    assert on_disk(path) == ["0", "1", "2", "3"] and (outcome.measured, outcome.left) == (4, 1)


def test_no_minutes_measure_one_cell_each_time(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for turn, key in enumerate("abc"):
        measured = Measured()
        outcome = run(measured, ResultFile(path, "gemm", FACTS), minutes=0)
        assert measured.calls == [key] and (outcome.measured, outcome.skipped, outcome.left) == (1, turn, 2 - turn)
    measured = Measured()
    assert str(run(measured, ResultFile(path, "gemm", FACTS), minutes=0)) == "0 cells measured, 3 were there"
    assert measured.calls == []


def test_a_wrong_cell_has_no_row_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    outcome = run(Measured(b=WrongResultError("b is off")), ResultFile(path, "gemm", FACTS))
    assert on_disk(path) == ["a", "c"] and outcome.wrong == ["b is off"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("19 GiB"), "out of memory"), (NotMeasuredError("it is too large"), "it is too large")],
    ids=["memory", "refused"],
)
def test_what_cannot_be_measured_says_why_and_is_not_tried_again(error: Exception, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run(Measured(b=error), ResultFile(path, "gemm", FACTS))
    assert json.loads(path.read_text())["rows"][1]["not_measured"] == reason
    again = Measured()
    run(again, ResultFile(path, "gemm", FACTS))
    assert again.calls == []


def test_an_unforeseen_error_has_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    outcome = run(Measured(b=RuntimeError("no image\nand a trace")), ResultFile(path, "gemm", FACTS))
    assert on_disk(path) == ["a", "b", "c"] and not outcome.unusable
    assert json.loads(path.read_text())["rows"][1]["not_measured"] == "RuntimeError: no image"
    assert outcome.failed == ["b: RuntimeError: no image"]
    again = Measured()
    run(again, ResultFile(path, "gemm", FACTS))
    assert again.calls == []


@pytest.mark.parametrize("words", ["an illegal memory access was encountered", "unspecified launch failure"])
def test_a_broken_context_ends_the_run_and_the_next_goes_on_behind(words: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    broken = Measured(a=RuntimeError(f"CUDA error: {words}\nCompile with ..."))
    outcome = run(broken, ResultFile(path, "gemm", FACTS))
    assert broken.calls == on_disk(path) == ["a"] and outcome.unusable and outcome.left == 2
    again = Measured()
    run(again, ResultFile(path, "gemm", FACTS))
    assert again.calls == ["b", "c"] and on_disk(path) == ["a", "b", "c"]


def test_a_context_that_takes_no_calls_is_found_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library's own error does not say why."""

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    path = tmp_path / "results.json"
    assert run(Measured(a=ValueError("status 7")), ResultFile(path, "gemm", FACTS)).unusable and on_disk(path) == ["a"]


def test_asked_for_what_could_not_be_measured_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run(Measured(b=ValueError("off")), ResultFile(path, "gemm", FACTS))
    again = Measured()
    cells.run(again.cells(), ResultFile(path, "gemm", FACTS), None, lambda line: None, again=True)
    assert again.calls == ["b"] and sorted(on_disk(path)) == ["a", "b", "c"]
    assert "not_measured" not in path.read_text()


def test_choices_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="the disk is full"):
        run(Measured(b=UserError("the disk is full")), ResultFile(path, "gemm", FACTS))
    assert on_disk(path) == ["a"]


def test_another_driver_goes_on_and_its_rows_say_so(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run(Measured(), ResultFile(path, "gemm", FACTS | {"driver": "580.1"}), minutes=0)
    run(Measured(), ResultFile(path, "gemm", FACTS | {"driver": "580.2"}), minutes=0)
    run(Measured(), ResultFile(path, "gemm", FACTS | {"driver": "580.1"}))
    content = json.loads(path.read_text())
    assert content["machine"]["driver"] == "580.1"
    assert [row.get("driver") for row in content["rows"]] == [None, "580.2", None]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "another card"}, 'device was "a card" and is "another card"'),
        ({"commit": "def"}, 'commit was "abc" and is "def"'),
        ({"changes": "123"}, 'changes was unknown and is "123"'),
        ({"vendors": {"library": "2"}}, "vendors was {'library': '1'} and is {'library': '2'}"),
    ],
    ids=["card", "commit", "changes", "vendors"],
)
def test_another_setting_is_refused_in_one_line(changed: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run(Measured(), ResultFile(path, "gemm", FACTS))
    before = path.read_bytes()
    with pytest.raises(UserError) as refused:
        ResultFile(path, "gemm", FACTS | changed)
    assert said in str(refused.value) and "--fresh" in str(refused.value) and "\n" not in str(refused.value)
    # With --fresh, what was there stays until there is something in its place.
    file = ResultFile(path, "gemm", FACTS | changed, fresh=True)
    assert path.read_bytes() == before
    run(Measured(), file, minutes=0)
    content = json.loads(path.read_text())
    assert content["machine"] == FACTS | changed and on_disk(path) == ["a"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"benchmark": "gemm", "machine": {}}',
        b'{"benchmark": "gemm", "machine": [], "rows": []}',
        b'{"benchmark": "gemm", "machine": {}, "rows": [{}]}',
        b'{"benchmark": "gemm", "machine": {}, "rows": [3]}',
        b'{"benchmark": 1, "machine": {}, "rows": []}',
        b"[" * 100_000,
    ],
    ids=["empty", "cut", "no text", "list", "null", "no rows", "machine", "no cell", "number", "name", "deep"],
)
def test_a_damaged_file_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is no file of results, or a damaged one"):
        ResultFile(path, "gemm", FACTS)
    assert path.read_bytes() == content


def test_results_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmark": "layer", "machine": FACTS, "rows": [{}]}))
    with pytest.raises(UserError, match='holds results of "layer", not of "gemm"'):
        ResultFile(path, "gemm", FACTS)


def test_a_write_that_fails_leaves_the_results_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    file = ResultFile(path, "gemm", FACTS)
    file.add("a", {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        file.add("b", {})
    monkeypatch.setattr(results.os, "fsync", os.fsync)
    assert on_disk(path) == ["a"]
