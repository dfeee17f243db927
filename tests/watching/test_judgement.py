"""Claim: a run hangs when no rank gets on, or one runs no Python; the late rank is the stopped one, the mute one,
the one in no collective, or the one that is elsewhere in the program than the others.

Run: pytest tests/watching/test_judgement.py
"""

from __future__ import annotations

from typing import Any

import pytest

from slope_dist.watching.judgement import Limits, collective_in, find_late, hangs, main_stack
from slope_dist.watching.machine import Evidence, Seen
from slope_dist.watching.record import Sign
from slope_dist.watching.report import Report

MAIN = 0x7F00
LIMITS = Limits(10.0, 100.0)
WAITS = """Thread 0x0000000000001234 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Current thread 0x0000000000007f00 (most recent call first):
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3015 in all_reduce
  File "/v/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/slope_dist/training/stopping.py", line 90 in agreed
"""
SLEEPS = """Thread 0x0000000000007f00 (most recent call first):
  File "/home/slope_dist/data/corpus.py", line 12 in tokens
  File "/home/slope_dist/training/trainer.py", line 90 in run
"""


def seen(
    rank: int, *, quiet: float = 20.0, mute: float = 0.2, long: bool = False, step: int = 5, place: int = 1
) -> Seen:
    sign = Sign(9, step, place, long, 0, 3, 40, True, False, "the step itself")
    return Seen(rank, "node1", 100 + rank, sign, quiet, mute)


def collective(number: int, *, ended: bool = False, name: str = "gloo:all_reduce", group: str = "0") -> dict[str, Any]:
    return {"group": group, "number": number, "name": name, "sizes": [[1]], "ended": ended, "thread": MAIN}


def found(rank: int, stacks: str = WAITS, *entries: dict[str, Any], state: str = "S", **how: Any) -> Evidence:
    return Evidence(seen(rank, **how), state, stacks, MAIN, list(entries))


def test_a_run_hangs_when_nobody_gets_on() -> None:
    assert hangs([seen(0), seen(1)], LIMITS)
    assert not hangs([seen(0), seen(1, quiet=9.9)], LIMITS), "one gets on, and the others wait for it"
    assert not hangs([seen(0, long=True), seen(1, long=True)], LIMITS)
    assert hangs([seen(0, long=True, quiet=100.0), seen(1, long=True, quiet=101.0)], LIMITS)
    assert not hangs([], LIMITS)


def test_one_in_a_step_holds_up_those_that_may_take_long() -> None:
    assert hangs([seen(0, long=True), seen(1)], LIMITS)


def test_a_run_hangs_with_one_interpreter() -> None:
    assert hangs([seen(0, quiet=0.0), seen(1, mute=10.0)], LIMITS)
    assert not hangs([seen(0, quiet=0.0), seen(1, mute=9.0)], LIMITS)
    assert not hangs([seen(0, quiet=0.0), seen(1, mute=11.0, long=True)], LIMITS)


def test_frames_are_those_of_the_main_thread() -> None:
    frames = main_stack(found(0))
    assert [frame.function for frame in frames] == ["all_reduce", "wrapper", "agreed"]
    assert collective_in(frames) == "all_reduce"
    assert collective_in(main_stack(found(0, SLEEPS))) is None


@pytest.mark.parametrize(
    ("ranks", "late", "why"),
    [
        ([found(0), found(1, state="T"), found(2)], (1,), "is stopped"),
        ([found(0), found(1, mute=19.0), found(2, SLEEPS)], (1,), "runs no Python"),
        ([found(0), found(1, mute=19.0, state="D")], (1,), "waits in the kernel"),
        # Late, on a busy machine.
        ([found(0), found(1, mute=3.0), found(2, SLEEPS)], (2,), "is in no collective"),
        ([found(0), found(1), found(2, SLEEPS)], (2,), "is in no collective"),
        # Two are in none; the others wait for one of them.
        (
            [
                found(0, WAITS, collective(8)),
                found(1, SLEEPS, collective(8, ended=True)),
                found(2, SLEEPS, collective(7, ended=True)),
            ],
            (2,),
            "is in no collective",
        ),
        ([found(0), found(1, step=6, place=0), found(2)], (1,), "it has left out a collective"),
        ([found(0, place=3), found(1, place=2)], (0,), "it has left out a collective"),
        (
            [found(0, WAITS, collective(8)), found(1, WAITS, collective(8)), found(2, WAITS, collective(7))],
            (2,),
            "another collective",
        ),
        ([found(0), found(1)], (0, 1), "no rank stands out"),
    ],
)
def test_who_is_late(ranks: list[Evidence], late: tuple[int, ...], why: str) -> None:
    verdict = find_late(ranks, len(ranks))
    assert verdict.ranks == late and why in verdict.why


def test_a_rank_that_does_not_answer_is_late_where_all_others_wait() -> None:
    assert find_late([found(0), found(1)], 4).ranks == (2, 3)


def test_a_device_waits_without_a_frame_of_its_own() -> None:
    """Under NCCL the CPU stands in reading a number from the device; the recorder knows what that waits for."""
    reads = SLEEPS.replace("corpus.py", "fsdp_engine.py")
    waiting = found(0, reads, collective(8, name="nccl:all_reduce") | {"thread": 1})
    busy = found(1, reads, collective(7, name="nccl:all_reduce", ended=True))
    assert find_late([waiting, busy], 2).ranks == (1,)


def test_the_line_says_who_where_and_in_what() -> None:
    ranks = [found(0), found(1), found(2, SLEEPS, collective(40, ended=True))]
    line = Report(12.2, 10.0, find_late(ranks, 3), ranks).cause()
    assert line == (
        "the run hangs, for 12 s: rank 2 (node1, process 102) is late at step 5, in the step itself: it is in no "
        "collective, at corpus.py:12 (tokens), ended its collective 40, all_reduce; ranks 0-1 are in all_reduce"
    )
