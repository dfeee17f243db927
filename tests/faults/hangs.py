"""A rank that stands still without dying: it is found in time and by name, the job ends, and the run goes on later."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slope_dist.errors import EXIT_HUNG
from tests.distributed import Outcome
from tests.faults.live import (
    FIRST_ADAPTER_STEP,
    FIVE,
    WholeRuns,
    entry_point,
    leftovers,
    mark_processes,
    ranks_of,
    unlike,
)
from tests.runs import watch_engines

HOW = ("stopped", "holds the lock", "skips a collective", "loader", "evaluation's loader", "asleep")
TIMEOUT, FIRST_TIMEOUT = 6.0, 20.0
"""Seconds in a run's course, and at its start. A step of these runs takes a hundredth of that, a start a tenth."""

SLACK = 5.0
EVALUATION_INTERVAL = 2


def hung(config: str, victim: int, how: str, step: int) -> None:
    """The real program; the `victim` stands still in step `step`, or in the evaluation after it."""
    mark_processes(Path(config).parent)
    if int(os.environ.get("RANK", "0")) == victim:
        _IN[how](Path(config).parent / "injected", step)
    entry_point(config)


def _begin(file: Path) -> None:
    file.write_text(repr(time.time()))


def _stopped(file: Path) -> None:
    _begin(file)
    os.kill(os.getpid(), signal.SIGSTOP)


def _holds_the_lock(file: Path) -> None:
    # A mutex that this thread holds already: unlike a sleep it is waited for again after a signal.
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    _begin(file)
    library.pthread_mutex_lock(mutex)


def _asleep(file: Path) -> None:
    _begin(file)
    time.sleep(10_000)


def _loader_waits(file: Path) -> None:
    lock = threading.Lock()
    lock.acquire()
    _begin(file)
    lock.acquire()


def _in_step(stand_still: Callable[[Path], None]) -> Callable[[Path, int], None]:
    def arm(file: Path, step: int) -> None:
        watch_engines(
            lambda event, engine, number: stand_still(file) if (event, number) == ("before step", step) else None
        )

    return arm


def _in_loader(file: Path, step: int) -> None:
    from slope_dist.data.sampling import BatchReader

    batch = BatchReader.batch

    def stuck(self: Any, at: int, positions: Any) -> Any:
        if at == step:
            _loader_waits(file)
        return batch(self, at, positions)

    BatchReader.batch = stuck  # type: ignore[method-assign]


def _in_evaluation(file: Path, step: int) -> None:
    from slope_dist.training import evaluation
    from slope_dist.training.trainer import Trainer

    batches, evaluate, due = evaluation.evaluation_batches, Trainer._evaluate, False

    def watched(self: Trainer) -> None:
        # A save reads such batches too.
        nonlocal due
        due = self.step == step
        evaluate(self)

    def stuck(*given: Any, **named: Any) -> Iterator[Any]:
        for batch in batches(*given, **named):
            if due:
                _loader_waits(file)
            yield batch

    Trainer._evaluate = watched  # type: ignore[method-assign]
    evaluation.evaluation_batches = stuck  # type: ignore[assignment]


def _skips(file: Path, step: int) -> None:
    from slope_dist.training.trainer import Trainer

    asked = Trainer._asked_to_stop

    def skipped(self: Trainer) -> bool:
        if self.step == step - 1:
            _begin(file)
            return False
        return asked(self)

    Trainer._asked_to_stop = skipped  # type: ignore[method-assign]


_IN: dict[str, Callable[[Path, int], None]] = {
    "stopped": _in_step(_stopped),
    "holds the lock": _in_step(_holds_the_lock),
    "asleep": _in_step(_asleep),
    "loader": _in_loader,
    "evaluation's loader": _in_evaluation,
    "skips a collective": _skips,
}
_SHOWN = {
    "stopped": "_stopped",
    "holds the lock": "_holds_the_lock",
    "asleep": "_asleep",
    "loader": "_loader_waits",
    "evaluation's loader": "_loader_waits",
    # It waits in a later one.
    "skips a collective": "entry_point",
}


class Hangs:
    """One rank stands still, in a step, in reading a batch, or beside a collective that it leaves out."""

    def __init__(self, whole: WholeRuns) -> None:
        self.whole = whole

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One hang."""
        how = HOW[index % len(HOW)]
        layout = draw.choice(FIVE[1:] if how == "skips a collective" else FIVE)
        victim = 0 if how == "asleep" else draw.randrange(ranks_of(layout))
        step = draw.randrange(2, 9)
        if how == "evaluation's loader":
            # The second evaluation with or without adapters: the first may take as long as a start.
            step = draw.choice([4, 8])
        elif how == "skips a collective":
            # After a step without an evaluation, in which ranks agree as well.
            step = draw.choice([2, 4, 6, 8])
        elif draw.random() < 0.2:
            step = 1
        first = FIRST_TIMEOUT
        if self.whole.launched:
            # What ranks import for themselves takes long on a busy machine, and is part of the start.
            first *= 10
            step = 3 if step in (1, FIRST_ADAPTER_STEP) and how != "skips a collective" else step
        config = self.whole.config(
            room,
            layout,
            evaluation__interval=EVALUATION_INTERVAL,
            watch__hang_timeout=TIMEOUT,
            watch__first_step_timeout=first,
        )
        where = f"{layout}: rank {victim} {how}, step {step}"
        outcomes = self.whole.end(hung, layout, config, victim, how, step)
        # Others that are past the step before may not take longer, whatever the one that skips is about to do.
        at_first = step in (1, FIRST_ADAPTER_STEP) and how != "skips a collective"
        timeout = first if at_first else TIMEOUT
        problem = _wrongly_found(room, outcomes, victim, step, timeout, _SHOWN[how]) or leftovers(room)
        problem = problem or self.whole.go_on(layout, config) or unlike(room / "run", self.whole.run(layout))
        return None if problem is None else f"{where}: {problem}"


def _wrongly_found(
    room: Path, outcomes: list[Outcome], victim: int, step: int, timeout: float, shown: str
) -> str | None:
    """What is wrong with the report of a hang, and with the end of its job."""
    if not (room / "injected").exists():
        return f"no rank stood still: {outcomes[victim].errors[-400:]}"
    if not all(outcome.code for outcome in outcomes):
        return f"codes {[outcome.code for outcome in outcomes]}"
    end = json.loads((room / "run" / "end.json").read_text())
    if (end["how"], end["exit_code"]) != ("failed", EXIT_HUNG):
        return f"end.json says {end}; {outcomes[0].errors[-600:]}"
    said = [line for outcome in outcomes for line in outcome.errors.splitlines() if line.startswith("error: ")]
    if said != [f"error: {end['cause']}"]:
        return f"said was {said}, not {end['cause']}"
    named = re.search(r": rank (\d+) \(.*?, process \d+\) is late at step (\d+), in ", end["cause"])
    if named is None or (int(named[1]), int(named[2])) != (victim, step) or end["late"] != [victim]:
        return f"the wrong rank or step: {end['cause']}"
    reports = list((room / "run" / "watch").glob("hang-*/report.json"))
    if len(reports) != 1:
        return f"there are {len(reports)} reports"
    late = reports[0].stat().st_mtime - float((room / "injected").read_text()) - timeout
    if late > SLACK:
        return f"found {late:.1f} s after the timeout"
    for rank in range(len(outcomes)):
        stacks = (reports[0].parent / f"rank-{rank:05d}.stacks.txt").read_text()
        if (shown if rank == victim else "entry_point") not in stacks:
            return f"the stacks of rank {rank} do not show where it is: {stacks[:600]}"
    return None
