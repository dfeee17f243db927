"""Whether a run hangs, and which rank is late.

When one rank hangs the others soon stand in a collective and wait for it, so a run hangs when no rank gets on with
anything; and also when a rank's interpreter stands still, whatever the others do. The late rank is, in this order,

    one that is stopped
    one whose interpreter does not run: a call keeps its lock, or waits in the kernel
    one that waits for nobody while others wait: its main thread is in no collective
    where all wait, the one whose collectives do not match its place in the program: it has left one out
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slope_dist.watching.machine import Evidence, Seen

MUTE = 2.0
"""Seconds after which an interpreter that gave no pulse is taken to stand still, in a run that hangs."""

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x(?P<number>[0-9a-f]+)")


@dataclass(frozen=True)
class Limits:
    """Seconds that a rank may get on with nothing.

    Attributes:
        usual: in the course of the run.
        start: at its start, and for what is done for the first time.
    """

    usual: float
    start: float

    def of(self, seen: Seen) -> float:
        """The limit of a rank where it is."""
        return self.start if seen.sign.long else self.usual


@dataclass(frozen=True)
class Late:
    """Who holds the others up.

    Attributes:
        ranks: usually one.
        why: in words that follow "it".
    """

    ranks: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Frame:
    """A line of a stack."""

    file: str
    line: int
    function: str


def hangs(ranks: Sequence[Seen], limits: Limits) -> bool:
    """Whether these are the ranks of a run that hangs."""
    if not ranks:
        return False
    # The shortest limit: a rank that is stuck in a step holds up others that are already in what may take long.
    limit = min(limits.of(seen) for seen in ranks)
    return all(seen.quiet >= limit for seen in ranks) or any(seen.mute >= limits.of(seen) for seen in ranks)


def main_stack(evidence: Evidence) -> list[Frame]:
    """The frames of the main thread, innermost first; empty where there are none."""
    frames: list[Frame] = []
    within = False
    for line in evidence.stacks.splitlines():
        thread = _THREAD.match(line)
        if thread is not None:
            if frames:
                break
            within = int(thread["number"], 16) == evidence.main
        elif within and (frame := _FRAME.match(line)) is not None:
            frames.append(Frame(frame["file"], int(frame["line"]), frame["function"]))
    return frames


def collective_in(frames: Sequence[Frame]) -> str | None:
    """The function of torch.distributed in which a stack stands; None if in none."""
    return next((frame.function for frame in frames if frame.file.endswith("distributed_c10d.py")), None)


def find_late(found: Sequence[Evidence], world_size: int) -> Late:
    """Which rank of a run that hangs is late."""
    stopped = [rank for rank in found if rank.is_stopped]
    if stopped:
        return _late(stopped, "is stopped (SIGSTOP, or a debugger)")
    # On a busy machine a pulse may be late; of a rank that hangs so, there has been none for about as long.
    mute = [rank for rank in found if rank.seen.mute >= max(MUTE, rank.seen.quiet / 2)]
    if mute:
        kernel = mute[0].state == "D"
        return _late(mute, "waits in the kernel" if kernel else "runs no Python: a call keeps the interpreter's lock")
    missing = sorted(set(range(world_size)) - {rank.seen.rank for rank in found})
    idle = [rank for rank in found if not _waits(rank)]
    if idle:
        waited_for = set().union(*(_waited_for(rank, found) for rank in found))
        first = [rank for rank in idle if rank.seen.rank in waited_for] or idle
        place = min(_place(rank) for rank in first)
        return _late([rank for rank in first if _place(rank) == place], "is in no collective")
    if missing:
        return Late(tuple(missing), "does not answer, nor does its machine")
    return _out_of_step(found)


def _out_of_step(found: Sequence[Evidence]) -> Late:
    """All wait: who has left out a collective is further in the program, and as a rule alone."""
    for key, why in (
        (_place, "waits at another place in the program than the others: it has left out a collective"),
        (_newest, "waits in another collective than the others"),
    ):
        counts = Counter(map(key, found))
        if len(counts) > 1:
            fewest = min(counts.values())
            # Of two, the one further on; of more, the one that is alone.
            odd = max(value for value, count in counts.items() if count == fewest)
            return _late([rank for rank in found if key(rank) == odd], why)
    return _late(found, "waits in a collective, as all do: no rank stands out")


def _late(ranks: Sequence[Evidence], why: str) -> Late:
    return Late(tuple(rank.seen.rank for rank in ranks), why)


def _place(rank: Evidence) -> tuple[Any, ...]:
    return rank.seen.sign.step, rank.seen.sign.place


def _newest(rank: Evidence) -> tuple[Any, ...]:
    """Its collectives under way, by group."""
    waiting = [entry for entry in rank.collectives or () if not entry["ended"]]
    return tuple(sorted((e["group"], e["number"], e["name"], str(e["sizes"])) for e in waiting))


def _waits(rank: Evidence) -> bool:
    """Whether the main thread waits for other ranks, by itself or for a thread that does."""
    frames = main_stack(rank)
    if collective_in(frames) is not None:
        return True
    under_way = [entry for entry in rank.collectives or () if not entry["ended"]]
    if any(entry["thread"] == rank.main for entry in under_way):
        return True
    # A backward pass, a save in its thread, a device whose collectives nobody waits for on the CPU.
    asynchronous = any(not entry["name"].startswith("gloo") for entry in under_way)
    through = any("torch/autograd" in frame.file or frame.file.endswith("checkpoint/saver.py") for frame in frames)
    return bool(under_way) and (asynchronous or through)


def _waited_for(rank: Evidence, found: Sequence[Evidence]) -> set[int]:
    """Ranks that have not come to a collective in which this one is."""
    result = set()
    for entry in rank.collectives or ():
        if entry["ended"]:
            continue
        for other in found:
            numbers = [e["number"] for e in other.collectives or () if e["group"] == entry["group"]]
            # A rank that never used a group may not belong to it.
            if other is not rank and numbers and max(numbers) < entry["number"]:
                result.add(other.seen.rank)
    return result
