"""A benchmark as cells, the most important first, as many as time allows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from slope_dist.benchmark.results import ResultFile
from slope_dist.benchmark.timing import WrongResultError


class NotMeasuredError(Exception):
    """Why a cell cannot be measured here, which stands in the results in its place."""


@dataclass(frozen=True)
class Cell:
    """One thing to measure: what it is called, the same in every run, and what measures it."""

    key: str
    measure: Callable[[], dict[str, Any]]


@dataclass
class Outcome:
    """What became of the cells.

    Attributes:
        measured: how many were, now.
        skipped: how many were there already.
        left: how many there was no time for.
        wrong: why a rival of a cell is wrong; such a cell is not timed and has no row.
    """

    measured: int = 0
    skipped: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.measured} cells measured, {self.skipped} were there"
        return f"{text}, {self.left} left for the next run" if self.left else text


def run(cells: Iterable[Cell], file: ResultFile, minutes: float | None, say: Callable[[str], None]) -> Outcome:
    """Measure the cells that the file does not have, in their order, each appended as it is done.

    Args:
        cells: in order of importance.
        file: of the results.
        minutes: none is begun later than this, but one is in any case; None: all.
        say: told of each cell before it is measured.
    """
    outcome = Outcome()
    done = file.cells
    start = time.monotonic()
    for cell in cells:
        if cell.key in done:
            outcome.skipped += 1
            continue
        tried = outcome.measured + len(outcome.wrong)
        if minutes is not None and tried and time.monotonic() - start >= minutes * 60:
            outcome.left += 1
            continue
        say(cell.key)
        try:
            row = cell.measure()
        except WrongResultError as error:
            outcome.wrong.append(str(error))
            continue
        except NotMeasuredError as error:
            row = {"not_measured": str(error)}
        except torch.OutOfMemoryError:
            row = {"not_measured": "out of memory"}
        finally:
            # Whatever the cell held on a GPU must not count in the next one's memory.
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
        file.add(cell.key, row)
        outcome.measured += 1
    return outcome
