"""Claim: of another process the stacks are read whether it sleeps, is stopped or holds the interpreter's lock; its
still seconds are counted; killing it ends what it has started.

Run: pytest tests/watching/test_machine.py
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from slope_dist.watching.judgement import main_stack
from slope_dist.watching.machine import Machine
from tests.watching.hearts import heart


@pytest.mark.parametrize(
    ("does", "how", "shown", "state"),
    [
        ("stand_still", None, "stand_still", "S"),
        ("stand_still", "stopped", "stand_still", "T"),
        ("hold_the_lock", None, "hold_the_lock", "S"),
    ],
)
def test_the_stacks_of_a_rank_that_stands_still(does: str, how: str | None, shown: str, state: str) -> None:
    with heart(does) as (process, address):
        if does == "hold_the_lock":
            assert process.stdout is not None
            process.stdout.readline()
        machine = Machine("here", {3: address})
        if how == "stopped":
            _until(lambda: "its work" in machine.ranks[3].seen.sign.doing, machine)
            process.send_signal(signal.SIGSTOP)
        _until(lambda: psutil.Process(process.pid).status() != psutil.STATUS_RUNNING, machine)
        time.sleep(0.1)
        (evidence,) = machine.evidence()
        assert evidence.state == state, evidence
        # In `step` 5, which another machine may be told.
        assert type(evidence).from_json(evidence.to_json()) == evidence
        assert shown in [frame.function for frame in main_stack(evidence)]
        if does == "hold_the_lock":
            assert evidence.collectives is None
        else:
            assert evidence.collectives is not None and evidence.collectives[0]["number"] == 7


def test_still_seconds_are_counted() -> None:
    with heart("get_on") as (_, moving), heart("stand_still") as (process, still):
        machine = Machine("here", {0: moving, 1: still})
        _until(lambda: "its work" in machine.ranks[1].seen.sign.doing, machine)
        machine.look(0.0)
        for _ in range(5):
            time.sleep(0.3)
            machine.look(0.3)
        quiet, mute = zip(*[(seen.quiet, seen.mute) for seen in machine.seen()], strict=True)
        assert quiet[0] == 0.0 and quiet[1] == pytest.approx(1.5)
        assert max(mute) <= 0.6, "Python runs in both"
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        machine.look(0.0)
        machine.look(2.5)
        assert machine.ranks[1].seen.mute >= 2.5


def test_killing_ends_what_a_rank_has_started() -> None:
    with heart("start_another") as (process, address):
        assert process.stdout is not None
        child = int(process.stdout.readline())
        Machine("here", {0: address}).kill()
        assert process.wait(timeout=10) == -signal.SIGKILL
        end = time.monotonic() + 10
        while Path(f"/proc/{child}").exists() and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_process_that_has_gone_is_none_to_watch() -> None:
    with heart("stand_still") as (process, address):
        process.kill()
        process.wait()
        machine = Machine("here", {4: address})
        assert not machine.unseen and not machine.watched()


def test_one_that_may_not_be_looked_into_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    machine = Machine("here", {4: {"pid": os.getpid(), "main": 1, "record": 0, "stacks": 0, "trace": 0}})
    assert machine.unseen == {4: "Permission denied"} and not machine.watched()


def _until(done: object, machine: Machine) -> None:
    end = time.monotonic() + 10
    assert callable(done)
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)
        machine.look(0.0)
