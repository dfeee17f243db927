"""The runner of the layout matrix runs what is missing or failed, keeps what passed, and says which it was.

Run: pytest tests/layouts/test_runner.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slope_dist.parallel.layout import Layout
from tests.layouts import __main__ as command
from tests.layouts import cases as matrix
from tests.layouts.cases import Bounds, Case
from tests.layouts.runner import SOURCES, Runner
from tests.resumable import sources_hash

CASE = Case(Layout(), "zero1")


@pytest.fixture
def printed() -> list[str]:
    return []


def runner(folder: Path, corpus: Path, printed: list[str], sources: str = "one") -> Runner:
    return Runner(folder, lambda _: corpus, sources, printed.append)


@pytest.mark.slow
def test_only_what_has_not_passed_is_run_again(
    tmp_path: Path, corpus: Path, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runner(tmp_path, corpus, printed).run([CASE])
    assert printed[1].split()[:8] == [*CASE.name.split(), "10"] and printed[1].endswith("pass")
    assert printed[-1] == "1 pass, 0 FAIL, 0 skipped"
    first = json.loads((tmp_path / "results.json").read_text())

    printed.clear()
    assert runner(tmp_path, corpus, printed).run([CASE])
    assert printed[1].endswith("pass (kept)")
    assert json.loads((tmp_path / "results.json").read_text()) == first

    # Other sources: run again, and now it fails, by bounds that nothing meets.
    monkeypatch.setitem(
        matrix.BOUNDS,
        "fp32",
        Bounds(loss=-1, norm=-1, later_norm=-1, weight=None, gradient=-1, rounding=1, adapters=True),
    )
    printed.clear()
    assert not runner(tmp_path, corpus, printed, "two").run([CASE])
    assert "FAIL" in printed[1] and "loss is off by" in printed[1] and "(kept)" not in printed[1]

    # Failures are not kept.
    monkeypatch.undo()
    printed.clear()
    assert runner(tmp_path, corpus, printed, "two").run([CASE])
    assert printed[1].endswith("pass")


def test_a_case_that_cannot_run_fails_and_leaves_its_traceback(
    tmp_path: Path, corpus: Path, printed: list[str]
) -> None:
    impossible = Case(Layout(), "zero1", pattern="3:4")
    assert not runner(tmp_path, corpus, printed).run([impossible, CASE])
    assert "FAIL" in printed[1] and "did not run" in printed[1] and "sparsity.pattern" in printed[1]
    [log] = (tmp_path / "failures").iterdir()
    assert "Traceback" in log.read_text()
    assert printed[2].endswith("pass"), "the others go on"
    assert printed[-1] == "1 pass, 1 FAIL, 0 skipped"


def test_a_results_file_cut_short_loses_only_time(tmp_path: Path, corpus: Path, printed: list[str]) -> None:
    (tmp_path / "results.json").write_text('{"sources": "one", "cas')
    assert runner(tmp_path, corpus, printed).results == {}


def test_the_hash_follows_the_sources(tmp_path: Path) -> None:
    for name in ("tests/runs.py", "tests/distributed.py", "constraints.txt", "slope_dist/a/b.py", "tests/layouts/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    seen = {sources_hash(SOURCES, tmp_path)}
    for name in ("slope_dist/a/b.py", "tests/layouts/c.py", "constraints.txt"):
        (tmp_path / name).write_text("y")
        seen.add(sources_hash(SOURCES, tmp_path))
    assert len(seen) == 4
    (tmp_path / "slope_dist/notes.md").write_text("z")
    assert sources_hash(SOURCES, tmp_path) in seen


def test_names_that_match_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["*tp3*"]) == 2
    assert "no case is called *tp3*" in capsys.readouterr().err
    assert command.main(["--list", "opt 2:4 fp32 tp2 pp2*"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "opt 2:4 fp32 tp2 pp2 dp1 zero0"
