"""metrics.jsonl as it grows, for those who look at a run from outside. Without torch."""

from __future__ import annotations

import json
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

RECENT = 50
"""Steps that the mean of the loss and the speed are taken over."""

_LONGEST_LINE = 2**24


class Metrics:
    """What the rows so far say. `read` takes in those that are new, and all anew where the file is another one.

    A job that goes on after a checkpoint replaces the file by one without the rows of lost steps.

    Attributes:
        steps: the last rows of training steps, at most `RECENT`.
        evaluation: the last row of an evaluation.
        step_seconds: time spent in the steps whose rows are there and that changed something.
        skipped: steps that were skipped for gradients that are not finite.
        straggler: the last row of each rank and kind that was slow at some time.
        drift: the last row about differing copies.
        save_problem: the last row about a save that went wrong, if none has succeeded since.
        unreadable: lines that are no rows, but for a last one that is being written.
        first_time: when the first row was written, in seconds since 1970.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clear()

    def _clear(self) -> None:
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self.steps: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.evaluation: dict[str, Any] | None = None
        self.step_seconds = 0.0
        self.skipped = 0
        self.straggler: dict[tuple[Any, Any], dict[str, Any]] = {}
        self.drift: dict[str, Any] | None = None
        self.save_problem: dict[str, Any] | None = None
        self.unreadable = 0
        self.first_time: float | None = None

    def read(self) -> None:
        """Take in what is new.

        Raises:
            OSError: if the file cannot be read, or is not a plain one; one that is not there has no rows.
        """
        try:
            # A pipe without a writer would keep an ordinary open waiting.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            self._clear()
            return
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(22, "not a plain file", str(self._path))
            if self._file != (found.st_dev, found.st_ino) or found.st_size < self._offset:
                self._clear()
                self._file = found.st_dev, found.st_ino
            file.seek(self._offset)
            for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
                if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                    break  # Being written.
                self._offset += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        if not isinstance(row, dict) or not is_number(row.get("step")):
            self.unreadable += 1
            return
        if self.first_time is None and is_number(row.get("time")):
            self.first_time = row["time"]
        if "loss" in row:
            self.steps.append(row)
            self.skipped += row.get("skipped") == "non-finite"
            if "skipped" not in row:
                self.step_seconds += seconds_of(row) or 0.0
        elif "eval_loss" in row:
            self.evaluation = row
        elif isinstance(row.get("straggler"), dict):
            told = row["straggler"]
            self.straggler[str(told.get("rank")), str(told.get("what"))] = row
        elif isinstance(row.get("drift"), dict):
            self.drift = row
        elif "save_problem" in row:
            self.save_problem = row
        elif "checkpoint" in row:
            self.save_problem = None

    def last(self, name: str) -> float | None:
        """A number of the last step's row; None where it has none."""
        value = self.steps[-1].get(name) if self.steps else None
        return value if is_number(value) else None

    def mean_loss(self) -> tuple[float, int] | None:
        """Mean loss of the last steps that have one, and how many these are."""
        losses = [row["loss"] for row in self.steps if is_number(row["loss"])]
        return (sum(losses) / len(losses), len(losses)) if losses else None

    def seconds_per_step(self) -> float | None:
        """Median of the last steps."""
        seconds = list(self._recent_seconds())
        return median(seconds) if seconds else None

    def _recent_seconds(self) -> Iterator[float]:
        for row in self.steps:
            seconds = seconds_of(row)
            if seconds is not None:
                yield seconds


def seconds_of(row: dict[str, Any]) -> float | None:
    """What a step took, from its tokens and their speed; None where its row does not say."""
    step, tokens, speed = (row.get(name) for name in ("step", "tokens", "tokens_per_second"))
    if is_number(step) and is_number(tokens) and is_number(speed) and step >= 1 and speed > 0:
        seconds = tokens / step / speed
        return seconds if is_number(seconds) else None
    return None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number; files may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
