"""Claim: training stands still for the copy alone, no later step leaks into a file, one save is under way at a time,
and a save that fails leaves the last checkpoint as it was and is tried again, on all ranks alike. What a killed save
has left does not stand in the way of the next.

Run alone: python -m pytest tests/checkpoint/test_saver.py
"""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from slope_dist.checkpoint import Checkpoint, Retention, Saver, find_newest, saver, writer
from slope_dist.checkpoint.host_copy import HostCopy
from slope_dist.checkpoint.saver import ATTEMPTS, Outcome, Patience
from slope_dist.parallel.collectives import rank
from tests.distributed import end_ranks, run_ranks

from .states import assert_holds, fragments_of, in_child, kill_at, make_state, save_state

PAUSE = 0.05


def make_saver(folder: Path, **keywords: Any) -> Saver:
    keywords = {"asynchronous": True, "first_pause": PAUSE} | keywords
    return Saver(folder, Retention(folder, 2), **keywords)


def save_step(found: Saver, step: int, patience: Patience | None = None) -> None:
    found.save(step, lambda: (fragments_of(make_state(step)), {"step": step}), {}, {}, patience=patience)


def none() -> float:
    """Of patience."""
    return 0.0


class Deadline:
    """So many seconds of patience from now on."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def __call__(self) -> float:
        return self.end - time.monotonic()


def ended(found: Saver) -> list[Outcome]:
    found.wait()
    return list(found.outcomes())


class Gate:
    """A point of a save at which it waits to be let through."""

    def __init__(self, point: str) -> None:
        self.point = point
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, reached: str) -> None:
        if reached == self.point:
            self.reached.set()
            assert self.open.wait(60)


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """The disk is full the first `times` times that a file is written; returns the attempts, as they are made."""
    write = writer._write_safetensors
    attempts: list[int] = []

    def full(path: Path, *arguments: Any) -> Any:
        if path.name.startswith("rank-00000.weights"):
            attempts.append(len(attempts))
        if len(attempts) <= times:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *arguments)

    monkeypatch.setattr(writer, "_write_safetensors", full)
    return attempts


def test_training_goes_on_while_it_is_written_and_no_later_step_leaks_in(tmp_path: Path) -> None:
    gate = Gate("weights")
    live = make_state(1)
    found = make_saver(tmp_path, progress=gate)
    for step in range(1, 4):
        for (name, kind), tensor in make_state(step).items():
            live[name, kind].copy_(tensor)
        gate.open.clear()
        found.save(step, lambda: (fragments_of(live), {}), {}, {})
        assert gate.reached.wait(60), "it is written by now, and training has gone on"
        for tensor in live.values():
            tensor.zero_()
        gate.open.set()
        [outcome] = ended(found)
        assert outcome.path is not None and outcome.problems == ()
        assert_holds(Checkpoint.open(outcome.path), make_state(step))
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000003"]


def test_the_stall_is_the_copy_and_the_save_the_whole(tmp_path: Path) -> None:
    gate = Gate("optimizer")
    found = make_saver(tmp_path, progress=gate)
    save_step(found, 1)
    assert gate.reached.wait(60)
    time.sleep(0.2)
    gate.open.set()
    [outcome] = ended(found)
    assert 0 < outcome.stall_seconds < outcome.seconds and outcome.seconds >= 0.2
    assert outcome.path is not None
    assert outcome.bytes == sum(path.stat().st_size for path in outcome.path.iterdir())
    assert outcome.copy_bytes == sum(tensor.nbytes for tensor in make_state(1).values())


def test_one_save_is_under_way_at_a_time(tmp_path: Path) -> None:
    gate = Gate("weights")
    found = make_saver(tmp_path, progress=gate)
    save_step(found, 1)
    assert gate.reached.wait(60)
    threading.Timer(0.3, gate.open.set).start()
    start = time.perf_counter()
    save_step(found, 2)
    assert time.perf_counter() - start >= 0.2, "the second waits for the first, which had not come far"
    outcomes = ended(found)
    assert [outcome.step for outcome in outcomes] == [1, 2]
    assert outcomes[1].stall_seconds >= 0.2, "and says so"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_tried_again(asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_saver(tmp_path, asynchronous=asynchronous)
    save_step(found, 1)
    assert [outcome.problems for outcome in ended(found)] == [()]
    attempts = failing(monkeypatch, 2)
    save_step(found, 2)
    for _ in range(200):
        if len(attempts) == 3:
            break
        time.sleep(0.05)
    outcomes = ended(found)
    assert [outcome.path is None for outcome in outcomes] == [True, True, False]
    for outcome, pause in zip(outcomes, (PAUSE, 2 * PAUSE), strict=False):
        [line] = outcome.problems
        assert "step 2 was not saved: rank 0: " in line and "No space left on device" in line
        assert line.endswith(f"; trying again in {pause:.1f}s") and "\n" not in line
    assert_holds(Checkpoint.open(tmp_path / "step-00000001"), make_state(1))
    assert_holds(Checkpoint.open(tmp_path / "step-00000002"), make_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def with_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full where a save finds another save's files beside its own."""
    write = writer._write_safetensors

    def full(path: Path, *arguments: Any) -> Any:
        if len(list(path.parents[1].glob("*.tmp-*"))) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *arguments)

    monkeypatch.setattr(writer, "_write_safetensors", full)


def test_what_a_killed_save_left_makes_room_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_child(lambda: save_state(tmp_path, 1, kill_at("optimizer"))) == -9
    assert len(list(tmp_path.glob("step-00000001.tmp-*/*"))) == 2
    with_room_for_one(monkeypatch)
    found = make_saver(tmp_path)
    save_step(found, 2, none)
    [outcome] = ended(found)
    assert outcome.path is not None and outcome.problems == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_what_a_failed_attempt_left_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_saver(tmp_path)
    assert in_child(lambda: save_state(tmp_path, 1, kill_at("optimizer"))) == -9
    with_room_for_one(monkeypatch)
    save_step(found, 2, none)
    failure, outcome = ended(found)
    assert failure.path is None and "No space left on device" in failure.problems[0]
    assert outcome.path is not None and outcome.problems == ()


def test_a_failing_save_gives_way_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = failing(monkeypatch, 1)
    found = make_saver(tmp_path, first_pause=30.0)
    save_step(found, 1)
    while not attempts:
        time.sleep(0.01)
    start = time.perf_counter()
    save_step(found, 2)
    outcomes = ended(found)
    assert time.perf_counter() - start < 20, "it does not sit out the pause"
    assert [(outcome.step, outcome.path is None) for outcome in outcomes] == [(1, True), (2, False)]
    newest = find_newest(tmp_path).checkpoint
    assert newest is not None and newest.step == 2


def test_a_save_that_training_waits_for_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = failing(monkeypatch, 10**9)
    found = make_saver(tmp_path, first_pause=0.01)
    save_step(found, 1, none)
    outcomes = ended(found)
    assert len(attempts) == len(outcomes) == ATTEMPTS
    assert all(outcome.path is None for outcome in outcomes)
    assert outcomes[-1].problems[0].endswith("; it is given up")
    assert not list(tmp_path.glob("step-*"))


def test_with_patience_an_outage_is_outlasted_and_told_as_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = failing(monkeypatch, 3 * ATTEMPTS)
    heard: list[str] = []
    found = make_saver(
        tmp_path,
        first_pause=0.01,
        hear=lambda: heard.extend(problem for outcome in found.outcomes() for problem in outcome.problems),
    )
    save_step(found, 1, lambda: 100.0)
    assert len(attempts) == 3 * ATTEMPTS + 1
    assert len(heard) == 3 * ATTEMPTS, "before the save has ended"
    assert all("No space left on device; trying again in " in line for line in heard)
    assert heard[0].endswith("trying again in 0.0s, and so on for 1m40s")
    [outcome] = ended(found)
    assert outcome.path is not None and outcome.problems == ()


def test_patience_ends_and_the_last_attempt_is_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = failing(monkeypatch, 10**9)
    monkeypatch.setattr(saver, "LONGEST_WAIT", 0.05)
    found = make_saver(tmp_path, first_pause=0.01)
    start = time.monotonic()
    save_step(found, 1, Deadline(1.0))
    assert 1.0 <= time.monotonic() - start < 10.0
    outcomes = ended(found)
    assert ATTEMPTS < len(attempts) == len(outcomes)
    assert outcomes[-1].problems[0].endswith("; it is given up")


def test_no_patience_is_wasted_on_what_cannot_be_saved(tmp_path: Path) -> None:
    found = make_saver(tmp_path, first_pause=0.01)
    found.save(1, lambda: (fragments_of(make_state(1)), {"half": object()}), {}, {}, patience=lambda: 100.0)
    outcomes = ended(found)
    assert len(outcomes) == ATTEMPTS
    assert "TypeError" in outcomes[0].problems[0] and outcomes[-1].problems[0].endswith("; it is given up")


def impatient_on_one_rank(folder: str, defect: bool) -> list[list[Any]]:
    """Saves that fail for longer than `ATTEMPTS`; the ranks' clocks differ."""
    path, write = Path(folder), writer._write_safetensors
    failures = 0

    def full(*arguments: Any) -> Any:
        nonlocal failures
        failures += 1
        if rank() == 1 and failures <= ATTEMPTS + 2:
            raise ValueError("a defect") if defect else OSError(errno.EIO, "Input/output error", str(arguments[0]))
        return write(*arguments)

    writer._write_safetensors = full
    found = make_saver(path, first_pause=0.01)
    save_step(found, 1, lambda: 100.0 * (1 - rank()))
    outcomes = ended(found)
    found.close()
    return [[outcome.path is not None, *outcome.problems] for outcome in outcomes]


@pytest.mark.parametrize("defect", [False, True])
def test_all_ranks_have_the_same_patience(defect: bool, tmp_path: Path) -> None:
    for seen in run_ranks(impatient_on_one_rank, 2, str(tmp_path), defect):
        if defect:
            assert [saved for saved, *_ in seen] == [False] * ATTEMPTS
            assert seen[-1][1].endswith("; it is given up")
        else:
            assert [saved for saved, *_ in seen] == [False] * (ATTEMPTS + 2) + [True]


def test_without_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: HostCopy, fragments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(HostCopy, "take", none_left)
    found = make_saver(tmp_path)
    save_step(found, 1)
    warning, outcome = list(found.outcomes())
    assert "no copy of step 1 (RuntimeError: DefaultCPUAllocator: can't allocate" in warning.problems[0]
    assert outcome.path is not None and outcome.stall_seconds == outcome.seconds
    assert_holds(Checkpoint.open(outcome.path), make_state(1))


def test_a_defect_in_the_thread_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("a defect")

    monkeypatch.setattr(writer, "save", broken)
    found = make_saver(tmp_path)
    save_step(found, 1)
    with pytest.raises(AssertionError, match="a defect"):
        found.wait()
    save_step(found, 2)
    found.linger(30)
    with pytest.raises(AssertionError, match="a defect"):
        list(found.outcomes())


def on_ranks(folder: str, victim: int) -> dict[str, Any]:
    """Saves on several ranks, with the disk of one full at first and the copy of one impossible later."""
    path = Path(folder)
    found = make_saver(path)
    write, take = writer._write_safetensors, HostCopy.take
    failures = 0

    def full(*arguments: Any) -> Any:
        nonlocal failures
        if rank() == victim and failures < 2:
            failures += 1
            raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))
        return write(*arguments)

    writer._write_safetensors = full
    save_step(found, 1)
    while not list(path.glob("step-????????")):
        time.sleep(0.02)
    first = ended(found)

    def none_left(self: HostCopy, fragments: Any) -> Any:
        if rank() == victim:
            raise MemoryError
        return take(self, fragments)

    HostCopy.take = none_left  # type: ignore[method-assign]
    save_step(found, 2)
    second = ended(found)
    found.close()
    return {
        "first": [[outcome.path is not None, *outcome.problems] for outcome in first],
        "second": [[outcome.path is not None, *outcome.problems] for outcome in second],
    }


@pytest.mark.parametrize("victim", [0, 1])
def test_all_ranks_try_again_and_wait_together(victim: int, tmp_path: Path) -> None:
    results = run_ranks(on_ranks, 2, str(tmp_path), victim)
    for seen in results:
        assert [saved for saved, *_ in seen["first"]] == [False, False, True]
        assert all(f"rank {victim}: " in problem for _, *problems in seen["first"] for problem in problems)
        assert [saved for saved, *_ in seen["second"]] == [False, True]
        assert "no copy of step 2 (MemoryError" in seen["second"][0][1]
    for step in (1, 2):
        assert_holds(Checkpoint.open(tmp_path / f"step-0000000{step}"), make_state(step))


def dies_in_the_thread(folder: str, point: str) -> None:
    def die(reached: str) -> None:
        if reached == point and rank() == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    found = make_saver(Path(folder), progress=die)
    save_step(found, 1)
    try:
        found.wait()
    except RuntimeError as error:
        from slope_dist.parallel.failure import lost_a_peer

        assert lost_a_peer(error), error
        raise SystemExit(5) from None


@pytest.mark.parametrize("point", ["weights", "optimizer"])
def test_a_rank_that_dies_in_its_save_is_a_lost_rank_to_the_others(point: str, tmp_path: Path) -> None:
    survivor, victim = end_ranks(dies_in_the_thread, 2, str(tmp_path), point)
    assert victim.code == -9
    assert survivor.code == 5, survivor.errors
    assert find_newest(tmp_path).checkpoint is None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "LONGEST_PAUSE", 0.2)
