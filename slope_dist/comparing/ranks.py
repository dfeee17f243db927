"""All comparisons of ranks, behind one call a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from slope_dist.comparing.drift import Drift
from slope_dist.comparing.finding import Finding, Hosts
from slope_dist.comparing.stragglers import Stragglers
from slope_dist.config.watch import WatchConfig
from slope_dist.engine import Engine
from slope_dist.parallel import collectives


class RankComparison:
    """Every rank makes one when the process group exists, and calls `look` after every step.

    Args:
        settings: what is looked for, and how often.
        steps: the last step of the run, after which copies are compared whatever the interval.
    """

    def __init__(self, settings: WatchConfig, steps: int) -> None:
        self._settings = settings
        self._steps = steps
        self._hosts = Hosts()
        self._stragglers: Stragglers | None = None
        # A CPU rank by itself has nobody to be compared with; a GPU has its own best.
        if settings.straggler_interval and (collectives.world_size() > 1 or torch.cuda.is_available()):
            self._stragglers = Stragglers(settings.straggler_threshold, self._hosts)
        self._drift = Drift(self._hosts)

    def loading(self) -> AbstractContextManager[None]:
        """Around what makes the micro-batches of a step."""
        return nullcontext() if self._stragglers is None else self._stragglers.loading()

    def look(self, step: int, engine: Engine) -> list[Finding]:
        """What has changed, the same on every rank. Collective where something is due."""
        settings = self._settings
        findings: list[Finding] = []
        if self._stragglers is not None and step % settings.straggler_interval == 0:
            findings += self._stragglers.look()
        if settings.drift_interval and (step % settings.drift_interval == 0 or step == self._steps):
            findings += self._drift.look(step, engine.held())
        return findings
