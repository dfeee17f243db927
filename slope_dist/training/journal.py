"""What a run writes down: metrics.jsonl, TensorBoard events and the picture of the loss. Rank 0 only."""

from __future__ import annotations

import json
import os
import time
from math import isfinite
from typing import Any

from slope_dist.checkpoint import Outcome
from slope_dist.comparing.finding import Finding
from slope_dist.errors import UserError
from slope_dist.training.evaluation import Evaluation
from slope_dist.training.folder import RunFolder, read_rows
from slope_dist.training.plot import plot_losses


class Journal:
    """Writes each row at once, so that a kill loses none that was reported."""

    def __init__(self, folder: RunFolder, resumed_step: int) -> None:
        """Open the journal of a run that goes on after `resumed_step` (0: from the start); later rows are cut off.

        Raises:
            UserError: if the files cannot be read or written.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.rows = [row for row in read_rows(folder.metrics) if row["step"] <= resumed_step]
        try:
            partial = folder.metrics.with_name(f".{folder.metrics.name}.partial")
            with partial.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, folder.metrics)
            self._file = folder.metrics.open("a", buffering=1)
            self._board = SummaryWriter(str(folder.path), purge_step=resumed_step + 1)
        except OSError as error:
            raise UserError(f"{folder.metrics} cannot be written: {error.strerror or error}") from error

    def step(self, row: dict[str, Any]) -> None:
        """A training step."""
        self._write(row)
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu"):
            if row.get(name) is not None:
                self._board.add_scalar(f"train/{name}", row[name], row["step"])

    def evaluation(self, step: int, result: Evaluation) -> None:
        """An evaluation after `step`."""
        values = _values(result)
        each = {name: _values(part) for name, part in result.corpora.items()}
        row = {"step": step} | values | ({"corpora": each} if each else {})
        if any(row == {key: value for key, value in other.items() if key != "time"} for other in self.rows):
            return  # Done again, because a kill came between this row and the picture.
        self._write(row)
        for group, numbers in {"valid": values, **{f"valid {name}": part for name, part in each.items()}}.items():
            for name, value in numbers.items():
                if value is not None:
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def save(self, outcome: Outcome) -> None:
        """A checkpoint that has been written."""
        row = {
            "step": outcome.step,
            "checkpoint": str(outcome.path),
            "checkpoint_bytes": outcome.bytes,
            "stall_seconds": round(outcome.stall_seconds, 3),
            "save_seconds": round(outcome.seconds, 3),
            "copy_bytes": outcome.copy_bytes,
        }
        self._write(row)
        for name in ("stall_seconds", "save_seconds"):
            self._board.add_scalar(f"save/{name}", row[name], outcome.step)

    def problem(self, step: int, text: str) -> None:
        """What went wrong with a save, or with the removal of old checkpoints."""
        self._write({"step": step, "save_problem": text})

    def finding(self, step: int, finding: Finding) -> None:
        """What the watch has found after `step`."""
        self._write({"step": step, **finding.row})
        for name, value in finding.scalars.items():
            self._board.add_scalar(name, value, step)

    def draw(self, title: str) -> None:
        """Write loss.png."""
        plot_losses(self.rows, self.folder.picture, title)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        row = {**row, "time": round(time.time(), 3)}
        self.rows.append(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")


def _values(result: Evaluation) -> dict[str, float | None]:
    return {
        "eval_loss": finite(result.loss),
        "perplexity": finite(result.perplexity),
        "bits_per_byte": None if result.bits_per_byte is None else finite(result.bits_per_byte),
    }


def finite(value: float) -> float | None:
    """The value, or None (JSON has no NaN)."""
    return value if isfinite(value) else None
