"""kill -9, and what is left: of one rank, of all of them, at random and at each named point of a save."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import psutil

from tests.distributed import Outcome
from tests.faults.live import (
    FIVE,
    WholeRuns,
    committed,
    entry_point,
    killed_later,
    lost,
    ranks_of,
    unlike,
)

POINTS = ("weights", "optimizer", "voted", "manifest", "folder", "renamed", "latest")
"""Named points of a save; the last five are rank 0's."""

SPAN = 1.6
"""Seconds from the first step within which a rank is killed: a run takes about as long."""

GO_ON_EVERY = 5
"""Each so many trials the run is started again, by the same command, and must end as if nothing had been."""


class KilledAtRandom:
    """Kill one rank, or all of them at once, at a random moment of a run that saves after every step."""

    def __init__(self, whole: WholeRuns, all_ranks: bool) -> None:
        self.whole = whole
        self.all_ranks = all_ranks

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One kill."""
        layout = FIVE[index % len(FIVE)]
        ranks = ranks_of(layout)
        victims = list(range(ranks)) if self.all_ranks else [draw.randrange(ranks)]
        config = self.whole.config(room, layout)
        outcomes = self.whole.end(killed_later, layout, config, victims, draw.uniform(0, SPAN))
        return after_a_kill(self.whole, layout, room, outcomes, config, go_on=index % GO_ON_EVERY == 0)


def killed_at(config: str, victim: int, all_ranks: bool, point: str, number: int) -> None:
    """The real program; the `victim`, or every rank with it, dies at its `number`th passing of a point of a save."""
    from slope_dist.checkpoint import writer

    save = writer.save
    passed = 0

    def reached(event: str) -> None:
        nonlocal passed
        passed += event == point
        if event == point and passed == number:
            # Who started the ranks has no other children.
            (Path(config).parent / "killed").touch()
            others = psutil.Process(os.getppid()).children() if all_ranks else []
            for process in [other.pid for other in others if other.pid != os.getpid()] + [os.getpid()]:
                os.kill(process, signal.SIGKILL)

    if int(os.environ.get("RANK", "0")) == victim:
        writer.save = lambda *given, **named: save(*given, **named | {"progress": reached})
    entry_point(config)


class KilledAtPoint:
    """Kill a rank, or all of them, at each named point of a save in turn."""

    def __init__(self, whole: WholeRuns) -> None:
        self.whole = whole

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One kill."""
        point = POINTS[index % len(POINTS)]
        layout = FIVE[index // len(POINTS) % len(FIVE)]
        ranks = ranks_of(layout)
        victim = draw.randrange(ranks) if point in ("weights", "optimizer", "voted") else 0
        config = self.whole.config(room, layout)
        number = draw.randrange(1, 8)
        outcomes = self.whole.end(killed_at, layout, config, victim, draw.random() < 0.5, point, number)
        # A launcher's exit codes alone would not tell who killed whom.
        if outcomes[victim].code != -signal.SIGKILL or not (room / "killed").exists():
            return f"rank {victim} was to die at {point}, and ended with {outcomes[victim].code}"
        return after_a_kill(self.whole, layout, room, outcomes, config, go_on=index % GO_ON_EVERY == 0)


def after_a_kill(
    whole: WholeRuns, layout: str, room: Path, outcomes: list[Outcome], config: str, *, go_on: bool
) -> str | None:
    """What is wrong after ranks were killed: something lost, or, where the run goes on, another run."""
    undisturbed = whole.run(layout)
    run = room / "run"
    problem = lost(run, undisturbed, committed([outcome.output for outcome in outcomes]))
    if problem is None and go_on:
        problem = whole.go_on(layout, config) or unlike(run, undisturbed)
    return None if problem is None else f"{layout}: {problem}"
