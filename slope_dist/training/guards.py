"""Stops a run whose gradients are not finite again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slope_dist.engine import StepResult


class RunFailedError(Exception):
    """The run can not go on; the message says why in one line."""


@dataclass
class FiniteGuard:
    """Counts skipped steps. Overflows that fp16's loss scaler can still answer are its own affair and not counted."""

    limit: int
    skipped: int = 0
    in_a_row: int = 0

    def check(self, step: int, result: StepResult, samples: Sequence[int]) -> None:
        """Take note of a step.

        Args:
            step: the optimizer step.
            result: what became of it; the same on every rank.
            samples: numbers of the first and last sample of its global batch.

        Raises:
            RunFailedError: after `limit` non-finite steps in a row.
        """
        if result.skipped is None:
            self.in_a_row = 0
        elif result.skipped == "non-finite":
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= self.limit:
                raise RunFailedError(
                    f"gradients were not finite in {self.in_a_row} steps in a row, the last of them step {step} "
                    f"(loss {result.loss}, samples {samples[0]} to {samples[-1]}); no weight was changed by them. "
                    "Lower training.learning_rate or look at those samples"
                )
