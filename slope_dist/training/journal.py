"""What a run writes down: metrics.jsonl, TensorBoard events and the picture of the loss. Rank 0 only.

A disk that is full, or away for a while, costs events and pictures, but no row and no step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from slope_dist.checkpoint import Outcome
from slope_dist.comparing.finding import Finding
from slope_dist.errors import UserError
from slope_dist.output import tell
from slope_dist.training.evaluation import Evaluation
from slope_dist.training.folder import RunFolder, read_rows
from slope_dist.training.log_files import Board, RowFile, Trouble
from slope_dist.training.plot import plot_losses


class Journal:
    """Writes each row at once, so that a kill loses none that was reported.

    Args:
        folder: the run folder.
        resumed_step: after which the run goes on (0: from the start); later rows are cut off.
        say: called with a line on what cannot be written, and on what can be again.

    Raises:
        UserError: if the files cannot be read or written at the start.
    """

    def __init__(self, folder: RunFolder, resumed_step: int, say: Callable[[str], None] = tell) -> None:
        self.folder = folder
        self.rows = [row for row in read_rows(folder.metrics) if row["step"] <= resumed_step]
        try:
            partial = folder.metrics.with_name(f".{folder.metrics.name}.partial")
            with partial.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, folder.metrics)
            self._file = RowFile(folder.metrics, say)
            self._board = Board(folder.path, resumed_step + 1, say)
        except OSError as error:
            raise UserError(f"{folder.metrics} cannot be written: {error.strerror or error}") from error
        self._picture = Trouble(folder.picture.name, say)

    def step(self, row: dict[str, Any]) -> None:
        """A training step."""
        self._write(row)
        names = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")
        self._show({f"train/{name}": row.get(name) for name in names}, row["step"])

    def evaluation(self, step: int, result: Evaluation) -> None:
        """An evaluation after `step`."""
        values = _values(result)
        each = {name: _values(part) for name, part in result.corpora.items()}
        row = {"step": step} | values | ({"corpora": each} if each else {})
        of_step = (other for other in self.rows if other["step"] == step)
        if any(row == {key: value for key, value in other.items() if key != "time"} for other in of_step):
            return  # Done again, because a kill came between this row and the picture.
        self._write(row)
        for group, numbers in {"valid": values, **{f"valid {name}": part for name, part in each.items()}}.items():
            self._show({f"{group}/{name}": value for name, value in numbers.items()}, step)

    def save(self, outcome: Outcome) -> None:
        """A checkpoint that has been written."""
        row: dict[str, Any] = {
            "step": outcome.step,
            "checkpoint": str(outcome.path),
            "checkpoint_bytes": outcome.bytes,
            "stall_seconds": round(outcome.stall_seconds, 3),
            "save_seconds": round(outcome.seconds, 3),
            "copy_bytes": outcome.copy_bytes,
        }
        self._write(row)
        self._show({f"save/{name}": row[name] for name in ("stall_seconds", "save_seconds")}, outcome.step)

    def problem(self, step: int, text: str) -> None:
        """What went wrong with a save, or with the removal of old checkpoints."""
        self._write({"step": step, "save_problem": text})

    def finding(self, step: int, finding: Finding) -> None:
        """What the watch has found after `step`."""
        self._write({"step": step, **finding.row})
        self._show(finding.scalars, step)

    def draw(self, title: str) -> None:
        """Write loss.png."""
        try:
            plot_losses(self.rows, self.folder.picture, title)
        except OSError as error:
            self._picture.found(error, "it stays as it is until it can be")
        else:
            self._picture.over("it shows all steps")

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        row = {**row, "time": round(time.time(), 3)}
        self.rows.append(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def _show(self, scalars: Mapping[str, float | None], step: int) -> None:
        self._board.add(scalars, step, disk_is_well=not self._file.waits)


def _values(result: Evaluation) -> dict[str, float | None]:
    return {
        "eval_loss": finite(result.loss),
        "perplexity": finite(result.perplexity),
        "bits_per_byte": None if result.bits_per_byte is None else finite(result.bits_per_byte),
    }


def finite(value: float) -> float | None:
    """The value, or None (JSON has no NaN)."""
    return value if isfinite(value) else None
