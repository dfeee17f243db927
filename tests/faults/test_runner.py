"""The runner of fault trials goes on where it stopped, stops in time, repeats single trials and tells what failed.

Run: pytest tests/faults/test_runner.py
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import __main__ as command
from tests.faults.bounds import upper_bound
from tests.faults.kinds import all_kinds
from tests.faults.runner import SOURCES, Kind, Runner, Trial
from tests.resumable import sources_hash

Toy = Callable[..., Kind]


@pytest.fixture
def seen() -> list[tuple[str, int, float]]:
    """What the toys' trials were given: kind, index, first random number."""
    return []


@pytest.fixture
def toy(seen: list[tuple[str, int, float]]) -> Toy:
    """A kind of ten trials, each of which may fail, raise or be slow."""

    def make(name: str = "toy", fails: tuple[int, ...] = (), seconds: float = 0.0, act: Trial | None = None) -> Kind:
        def start(shared: Path) -> Trial:
            assert shared.is_dir()

            def trial(index: int, draw: random.Random, room: Path) -> str | None:
                assert list(room.iterdir()) == []
                (room / "folder").mkdir()
                (room / "folder" / "file").touch()
                seen.append((name, index, draw.random()))
                time.sleep(seconds)
                if act is not None:
                    return act(index, draw, room)
                return f"wrong at {index}" if index in fails else None

            return trial

        return Kind(name, f"A {name} is a toy.", 10, start)

    return make


def runner(folder: Path, printed: list[str] | None = None, sources: str = "one", **options: float) -> Runner:
    say = (lambda text: None) if printed is None else printed.append
    return Runner(folder, sources=sources, say=say, **options)  # type: ignore[arg-type]


def test_what_is_done_is_not_done_again_until_the_sources_change(tmp_path: Path, toy: Toy, seen: list) -> None:
    printed: list[str] = []
    assert runner(tmp_path, printed).run([toy()])
    assert [index for _, index, _ in seen] == list(range(10))
    assert printed[1].split()[:6] == ["toy", "10", "0", "30", "%", "1"] and printed[1].endswith("pass")
    mark = tmp_path / "shared" / "mark"
    mark.touch()

    printed.clear()
    assert runner(tmp_path, printed).run([toy()])
    assert len(seen) == 10 and printed[1].endswith("pass (kept)")

    # A larger number goes on; another seed and other sources begin anew, with other numbers only for the seed.
    assert runner(tmp_path, scale=1.5).run([toy()])
    assert [index for _, index, _ in seen[10:]] == list(range(10, 15)) and mark.exists()
    assert runner(tmp_path, seed=2).run([toy()])
    assert runner(tmp_path, sources="two").run([toy()])
    assert len(seen) == 35 and not mark.exists()
    assert seen[25:] == seen[:10] and not {number for *_, number in seen[15:25]} & {number for *_, number in seen[:15]}


def test_it_stops_in_time_and_goes_on(tmp_path: Path, toy: Toy, seen: list) -> None:
    printed: list[str] = []
    assert runner(tmp_path, printed).run([toy(seconds=0.05), toy("later")], minutes=0.15 / 60)
    done = len(seen)
    assert 1 <= done < 10 and {name for name, *_ in seen} == {"toy"}
    assert printed[1].endswith(f"{10 - done} trials are left: the same command goes on")
    assert printed[2].split()[:2] == ["later", "0"] and "not tried, 10 trials are left" in printed[2]
    assert runner(tmp_path).run([toy(), toy("later")])
    assert [index for _, index, _ in seen] == [*range(10), *range(10)]


def test_it_stops_while_what_is_shared_is_made(tmp_path: Path, toy: Toy, seen: list) -> None:
    def start(shared: Path) -> Trial:
        time.sleep(60)
        raise AssertionError

    printed: list[str] = []
    assert runner(tmp_path, printed).run([Kind("slow start", "", 3, start), toy()], minutes=0.2 / 60)
    assert ["not tried" in line for line in printed[1:]] == [True, True] and seen == []


def test_ctrl_c_and_an_unreadable_result_lose_little(tmp_path: Path, toy: Toy, seen: list) -> None:
    def interrupted(index: int, draw: random.Random, room: Path) -> str | None:
        if index == 4:
            raise KeyboardInterrupt
        return None

    assert command.main([], [toy(act=interrupted)], tmp_path) == 130
    assert command.main([], [toy()], tmp_path) == 0
    assert [index for _, index, _ in seen] == [*range(5), *range(4, 10)]
    [result] = tmp_path.glob("toy-*.json")
    result.write_text('{"sources": "one", "do')
    assert command.main([], [toy()], tmp_path) == 0
    assert len(seen) == 21
    assert list(tmp_path.glob("room-*")) == []


def test_failures_are_told_kept_and_repeated(tmp_path: Path, toy: Toy, seen: list, capsys) -> None:
    kinds = [toy(fails=(3, 7)), toy("good toy")]
    for _ in range(2):
        assert command.main([], kinds, tmp_path) == 1
        out = capsys.readouterr().out
        assert "FAIL" in out and "3: wrong at 3" in out and "7: wrong at 7" in out
        assert 'python -m tests.faults "toy" --only 3 --seed 1' in out
    assert len(seen) == 20

    first = next(item for item in seen if item[:2] == ("toy", 3))
    assert command.main(["toy", "--only", "3"], kinds, tmp_path) == 1
    out = capsys.readouterr().out
    room = tmp_path / "rooms" / "toy-3"
    assert out == f"toy 3: wrong at 3\n    its room is {room}\n" and (room / "folder" / "file").exists()
    assert seen[20:] == [first], "the same random numbers, and nothing else run"
    assert command.main(["toy", "--only", "4", "--only", "5"], kinds, tmp_path) == 0
    assert not (tmp_path / "rooms" / "toy-4").exists()
    assert command.main(["good*"], kinds, tmp_path) == 0


def test_errors_and_slowness_are_failures_and_the_others_go_on(tmp_path: Path, toy: Toy) -> None:
    def bad(index: int, draw: random.Random, room: Path) -> str | None:
        if index == 0:
            raise ValueError("a defect")
        if index == 1:
            time.sleep(60)
        return None

    def start(shared: Path) -> Trial:
        raise OSError("nothing to share")

    def skip(shared: Path) -> Trial:
        pytest.skip("too few GPUs")

    printed: list[str] = []
    slow = toy(act=bad)
    kinds = [
        Kind(slow.name, slow.claim, 3, slow.start, limit=0.2),
        Kind("none", "", 3, start),
        Kind("skipped", "", 3, skip),
        toy("good"),
    ]
    assert not runner(tmp_path, printed).run(kinds)
    text = "\n".join(printed)
    assert "0: raised ValueError: a defect (test_runner.py:" in text and "1: still running after 0 s" in text
    assert "OSError: nothing to share" in text and "skipped: too few GPUs" in text
    assert printed[-1].startswith("good") and printed[-1].endswith("pass")
    assert runner(tmp_path).run([kinds[2]]), "what cannot be tried has not failed"


def test_without_signals_slowness_is_told_afterwards(tmp_path: Path, toy: Toy) -> None:
    kind = toy(seconds=0.02)
    results: list[bool] = []
    slow = Kind(kind.name, kind.claim, 1, kind.start, limit=0.01)
    thread = threading.Thread(target=lambda: results.append(runner(tmp_path).run([slow])))
    thread.start()
    thread.join()
    assert results == [False]


def test_the_markdown_table(tmp_path: Path, toy: Toy, capsys) -> None:
    kinds = [toy(fails=(1,)), toy("new")]
    assert command.main(["toy"], kinds, tmp_path) == 1
    capsys.readouterr()
    assert command.main(["--markdown"], kinds, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1] == "|---|---|---|---|---|---|---|"
    assert lines[2].startswith("| toy | A toy is a toy. | 10 | 1 | 39 % | 1 | ")
    assert lines[3].startswith("| new | A new is a toy. | 0 | 0 | 100 % | 1 | ")


@pytest.mark.parametrize(
    "arguments",
    [["no such*"], ["--only", "10"], ["--only", "-1"], ["--minutes", "0"], ["--scale", "nan"], ["--seed", "x"], ["-x"]],
)
def test_a_bad_command_line(tmp_path: Path, toy: Toy, seen: list, arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        raise SystemExit(command.main(arguments, [toy()], tmp_path))
    assert leaving.value.code == 2 and "error: " in capsys.readouterr().err
    assert seen == []


def test_the_list(capsys) -> None:
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(all_kinds()) and lines[0].startswith("truncation (300): A checkpoint")
    names = [kind.name for kind in all_kinds()]
    assert len({*names}) == len(names)


@pytest.mark.parametrize(
    ("failures", "trials", "expected"),
    # Clopper and Pearson's one-sided 95 % bounds, from tables of the beta distribution.
    [(0, 0, 1.0), (0, 2, 1.0), (0, 300, 0.01), (1, 10, 0.3942), (2, 20, 0.2826), (10, 10, 1.0), (5, 1000, 0.01049)],
)
def test_the_upper_bound(failures: int, trials: int, expected: float) -> None:
    assert upper_bound(failures, trials) == pytest.approx(expected, rel=2e-3)


def test_the_hash_follows_the_sources(tmp_path: Path) -> None:
    names = ("tests/runs.py", "tests/distributed.py", "constraints.txt", "slope_dist/a.py", "tests/faults/b.py")
    for name in (*names, "launch/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    hashes = {sources_hash(SOURCES, tmp_path)}
    for name in names:
        (tmp_path / name).write_text("y")
        hashes.add(sources_hash(SOURCES, tmp_path))
    assert len(hashes) == 1 + len(names)
    (tmp_path / "slope_dist/notes.md").write_text("z")
    assert sources_hash(SOURCES, tmp_path) in hashes


def test_results_are_small_json(tmp_path: Path, toy: Toy) -> None:
    runner(tmp_path).run([toy(fails=(2,))])
    stored = json.loads((tmp_path / "toy-seed1.json").read_text())
    assert stored["done"] == 10 and stored["failures"] == {"2": "wrong at 2"} and len(stored["milliseconds"]) == 10
