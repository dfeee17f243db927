"""A rank that dies in a step, by a signal or an error: the others end soon, the first line of error says which and why,
nothing is left of them, and the run goes on.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.distributed import Outcome
from tests.faults.live import FIVE, WholeRuns, entry_point, leftovers, mark_processes, ranks_of, unlike
from tests.runs import watch_engines

SOON = 15.0


def dead(config: str, victim: int, how: str, step: int) -> None:
    """The real program; the `victim` dies in step `step`."""
    room = Path(config).parent
    mark_processes(room)
    # Dumps of the memory would take longer than all the rest.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def die(event: str, engine: object, number: int) -> None:
        if (event, number) == ("before step", step):
            (room / "injected").write_text(repr(time.time()))
            _BY[how]()

    if int(os.environ.get("RANK", "0")) == victim:
        watch_engines(die)
    entry_point(config)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segfault() -> None:
    ctypes.string_at(0)


def _raises() -> None:
    raise RuntimeError("a device that has fallen off the bus")


def _no_memory() -> None:
    raise MemoryError


_BY: dict[str, Callable[[], None]] = {
    "SIGKILL": _killed,
    "segfault": _segfault,
    "abort": os.abort,
    "exception": _raises,
    "MemoryError": _no_memory,
}
_CAUSES = {"exception": "RuntimeError: a device that has fallen off the bus", "MemoryError": "MemoryError"}
HOW = tuple(_BY)


class Deaths:
    """One rank dies in one of five ways."""

    def __init__(self, whole: WholeRuns) -> None:
        self.whole = whole

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One death."""
        how, layout = HOW[index % len(HOW)], draw.choice(FIVE)
        victim, step = draw.randrange(ranks_of(layout)), draw.randrange(1, 11)
        config = self.whole.config(room, layout)
        where = f"{layout}: rank {victim}, {how} in step {step}"
        outcomes = self.whole.end(dead, layout, config, victim, how, step)
        ended = time.time()
        problem = _wrongly_ended(room, outcomes, victim, how, ended) or leftovers(room)
        problem = problem or self.whole.go_on(layout, config) or unlike(room / "run", self.whole.run(layout))
        return None if problem is None else f"{where}: {problem}"


def _wrongly_ended(room: Path, outcomes: list[Outcome], victim: int, how: str, ended: float) -> str | None:
    if not (room / "injected").exists():
        return f"no rank died: {outcomes[victim].errors[-400:]}"
    codes = [outcome.code for outcome in outcomes]
    if not all(codes):
        return f"codes {codes}"
    seconds = ended - float((room / "injected").read_text())
    if seconds > SOON:
        return f"the ranks ended after {seconds:.1f} s"
    said = [line for outcome in outcomes for line in outcome.errors.splitlines() if line.startswith("error: ")]
    cause = _CAUSES.get(how)
    if len(outcomes) == 1:
        # Nobody is left who could say of what it died.
        expected = "" if cause is None else f"error: {cause}"
    else:
        expected = f"error: rank {victim} " + ("was lost" if cause is None else f"failed: {cause}")
    if not all(line.startswith(expected) for line in said) or (expected and not said):
        return f"said was {said}, not {expected}"
    return None
