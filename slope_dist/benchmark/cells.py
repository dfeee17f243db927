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
from slope_dist.errors import UserError
from slope_dist.sparse.kernels.failures import breaks_device


class NotMeasuredError(Exception):
    """Why a cell cannot be measured here, which stands in the results in its place."""


class CellFailedError(Exception):
    """Cells ended with errors that nobody foresaw; the results say which, in their place."""


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
        failed: cells that ended with an unforeseen error, and its words; each has a row that says so.
        unusable: the last of them took the device with it, and no other cell was begun.
    """

    measured: int = 0
    skipped: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unusable: bool = False

    def __str__(self) -> str:
        text = f"{self.measured} cells measured, {self.skipped} were there"
        return f"{text}, {self.left} left for the next run" if self.left else text


def run(
    cells: Iterable[Cell],
    file: ResultFile,
    minutes: float | None,
    say: Callable[[str], None],
    *,
    again: bool = False,
) -> Outcome:
    """Measure the cells that the file does not have, in their order, each appended as it is done.

    A cell that fails has a row too, so that the next run does not meet it first. After an error that leaves CUDA's
    context unusable nothing else is begun: the next process goes on behind it.

    Args:
        cells: in order of importance.
        file: of the results.
        minutes: none is begun that would end later than this if it took as long as the longest so far, but one is in
            any case; None: all.
        say: told of each cell before it is measured.
        again: also measure the cells of which the file says only why they were not measured.

    Raises:
        UserError: results or choices cannot be written.
    """
    outcome = Outcome()
    done = file.measured if again else file.cells
    start, longest = time.monotonic(), 0.0
    for cell in cells:
        if cell.key in done:
            outcome.skipped += 1
            continue
        tried = outcome.measured + len(outcome.wrong)
        begun = time.monotonic()
        if outcome.unusable or (minutes is not None and tried and begun - start + longest >= minutes * 60):
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
        except UserError:
            raise
        except Exception as error:
            # Of a compiler, a driver or a library, each with kinds of its own; only the words are kept, since the
            # error itself would keep the cell's tensors.
            row = {"not_measured": _words(error)}
            outcome.failed.append(f"{cell.key}: {row['not_measured']}")
            outcome.unusable = breaks_device(error, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        finally:
            # Whatever the cell held on a GPU must not count in the next one's memory.
            if torch.cuda.is_available() and not outcome.unusable:
                gc.collect()
                torch.cuda.empty_cache()
            longest = max(longest, time.monotonic() - begun)
        file.add(cell.key, row)
        outcome.measured += 1
    return outcome


def _words(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:200]}"
