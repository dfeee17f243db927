"""Bit-exact resume in the same layout from any step, and kills around the adapter switch with a resume in another."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from slope_dist.checkpoint import find_newest
from tests.faults.live import (
    FIRST_ADAPTER_STEP,
    FIVE,
    LAYOUTS,
    STEPS,
    WholeRuns,
    entry_point,
    lost,
    unlike,
)
from tests.runs import relative, step_rows, watch_engines


def killed_after(config: str, event: str, number: int) -> None:
    """The real program; every rank dies at the `number`th `event` of its engines."""
    passed = 0

    def watch(found: str, engine: object, _: object) -> None:
        nonlocal passed
        passed += found == event
        if found == event and passed == number:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_engines(watch)
    entry_point(config)


class CutAnywhere:
    """20 cut points in each of five layouts; checkpoints are rarer than steps, so that some are done again."""

    def __init__(self, whole: WholeRuns) -> None:
        self.whole = whole

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One cut, and the run to its end."""
        layout = FIVE[index % len(FIVE)]
        config = self.whole.config(room, layout, checkpoint__interval=draw.choice([1, 2, 3]))
        cut = draw.randrange(1, STEPS + 1)
        self.whole.end(killed_after, layout, config, "after step", cut)
        problem = self.whole.go_on(layout, config) or unlike(room / "run", self.whole.run(layout))
        return None if problem is None else f"{layout}, cut after step {cut}: {problem}"


SWITCH_EVENTS = (
    ("before step", FIRST_ADAPTER_STEP - 1),
    ("after step", FIRST_ADAPTER_STEP - 1),
    ("before close", 1),
    ("built", 2),
    ("loaded", 1),
    ("before step", FIRST_ADAPTER_STEP),
    ("after step", FIRST_ADAPTER_STEP),
    ("after step", FIRST_ADAPTER_STEP + 1),
)
"""Around the switch: the old engine closes, the new one is built, takes the state over, and takes its first steps."""


class KilledAtSwitch:
    """All ranks die around the switch, and the run goes on in another layout."""

    def __init__(self, whole: WholeRuns) -> None:
        self.whole = whole

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One kill."""
        source, target = draw.sample(list(LAYOUTS), 2)
        event, number = SWITCH_EVENTS[index % len(SWITCH_EVENTS)]
        config = self.whole.config(room, source)
        self.whole.end(killed_after, source, config, event, number)
        whole = self.whole.run(source)
        where = f"{source} -> {target}, {event} {number}"
        problem = lost(room / "run", whole, 0)
        if problem is not None:
            return f"{where}: {problem}"
        found = find_newest(room / "run" / "checkpoints").checkpoint
        if found is None or found.step < FIRST_ADAPTER_STEP - 3:
            return f"{where}: the newest checkpoint is {found and found.path.name}"
        if found.scalars["adapters"] != (found.step >= FIRST_ADAPTER_STEP):
            return f"{where}: {found.path.name} says adapters {found.scalars['adapters']}"
        config = self.whole.config(room, target)
        problem = self.whole.go_on(target, config)
        if problem is not None:
            return f"{where}: {problem}"
        rows, expected = step_rows(room / "run"), step_rows(whole)
        for mine, other in zip(rows, expected, strict=True):
            if mine["phase"] != other["phase"] or not relative(mine["loss"], other["loss"]) <= 1e-5:
                return f"{where}: step {mine['step']}: loss {mine['loss']} in {mine['phase']}, was {other['loss']}"
        last = find_newest(room / "run" / "checkpoints").checkpoint
        assert last is not None
        steps = last.scalars["optimizer_steps"]
        if steps["adapters"] != STEPS - FIRST_ADAPTER_STEP + 1 or steps["decay"] != STEPS:
            return f"{where}: step counters {steps}"
        return None
