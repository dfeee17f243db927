"""What is said and written of a hang: one line, and a folder with the Python stacks of every rank."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_dist.watching.judgement import Late, collective_in, main_stack
from slope_dist.watching.machine import Evidence

FOLDER = "watch"
"""In the run folder."""

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in the kernel",
    "T": "stopped",
    "t": "traced",
    "Z": "dead",
    "": "gone",
}


@dataclass(frozen=True)
class Report:
    """A hang that was looked into.

    Attributes:
        quiet: seconds since any rank has got on.
        limit: that it was measured by.
        late: who holds the others up.
        found: of every rank that answered, in order.
    """

    quiet: float
    limit: float
    late: Late
    found: Sequence[Evidence]

    @property
    def step(self) -> int:
        """That the late rank is in; of all, where it did not answer."""
        steps = [e.seen.sign.step for e in self.found if e.seen.rank in self.late.ranks]
        return min(steps or [e.seen.sign.step for e in self.found], default=0)

    def cause(self) -> str:
        """The hang in one line."""
        mine = [evidence for evidence in self.found if evidence.seen.rank in self.late.ranks]
        others = [evidence for evidence in self.found if evidence.seen.rank not in self.late.ranks]
        text = f"the run hangs, for {self.quiet:.0f} s: "
        if mine:
            seen = mine[0].seen
            where = f"at step {seen.sign.step}" if seen.sign.step else "before the first step"
            host = f" ({seen.host}, process {seen.process})" if len(mine) == 1 else ""
            text += f"{_ranks(self.late.ranks)}{host} {_is(mine)} late {where}, in {seen.sign.doing}: "
            text += f"it {self.late.why}{_at(mine[0])}, {_last(mine[0])}"
        else:
            text += f"{_ranks(self.late.ranks)} {self.late.why}"
        if others:
            waiting = sorted({collective_in(main_stack(other)) or other.seen.sign.doing for other in others})
            text += f"; {_ranks([o.seen.rank for o in others])} {_is(others)} in {' or '.join(waiting)}"
        return text

    def to_json(self) -> dict[str, Any]:
        """All but the stacks."""
        return {
            "cause": self.cause(),
            "quiet_seconds": round(self.quiet, 3),
            "timeout_seconds": self.limit,
            "late": list(self.late.ranks),
            "why": self.late.why,
            "step": self.step,
            "ranks": [_rank(evidence) for evidence in self.found],
        }

    def write(self, run_folder: Path) -> Path:
        """Write it to a new folder in the run folder; returns that.

        Raises:
            OSError: if that cannot be done.
        """
        folder = run_folder / FOLDER / time.strftime("hang-%Y%m%d-%H%M%S", time.gmtime())
        folder.mkdir(parents=True)
        for evidence in self.found:
            (folder / f"rank-{evidence.seen.rank:05d}.stacks.txt").write_text(evidence.stacks)
        (folder / "report.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")
        return folder


def _rank(evidence: Evidence) -> dict[str, Any]:
    seen = evidence.seen
    return {
        "rank": seen.rank,
        "host": seen.host,
        "process": seen.process,
        "step": seen.sign.step,
        "doing": seen.sign.doing,
        "quiet_seconds": round(seen.quiet, 3),
        "python_stands_still_seconds": round(seen.mute, 3),
        "state": _STATES.get(evidence.state, evidence.state),
        "in_collective": collective_in(main_stack(evidence)),
        "collectives_of_default_group": seen.sign.collectives,
        "last_collectives": None if evidence.collectives is None else [_named(e) for e in evidence.collectives],
        "at": [f"{frame.file}:{frame.line} {frame.function}" for frame in main_stack(evidence)[:5]],
    }


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "thread"}


def _at(evidence: Evidence) -> str:
    """Where it stands, in our own code where it has come from there."""
    frames = main_stack(evidence)
    if not frames:
        return ", and wrote no stack"
    frame = next((f for f in frames if "site-packages" not in f.file and "/lib/python" not in f.file), frames[0])
    return f", at {Path(frame.file).name}:{frame.line} ({frame.function})"


def _last(evidence: Evidence) -> str:
    """Its last collective, as far as it is known."""
    entries = evidence.collectives or []
    if entries:
        # The recorder keeps the order in which they began.
        last = next((entry for entry in reversed(entries) if not entry["ended"]), entries[-1])
        name, group = last["name"].rpartition(":")[2], "" if last["group"] == "0" else f" of group {last['group']}"
        return f"{'ended its' if last['ended'] else 'waits in its'} collective {last['number']}{group}, {name}"
    number = evidence.seen.sign.collectives
    return f"its last collective was number {number}" if number >= 0 else "its last collective is not known"


def _ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    shown = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _is(ranks: Sequence[Evidence]) -> str:
    return "is" if len(ranks) == 1 else "are"
