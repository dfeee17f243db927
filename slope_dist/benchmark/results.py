"""A file of results that grows cell by cell, and is taken up again where it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slope_dist.benchmark import machine
from slope_dist.errors import UserError
from slope_dist.files import read_bounded

LARGEST_FILE = 2**28


class ResultFile:
    """The rows of one benchmark, each under the key of its cell, all measured in the same setting.

    Every row is on the disk, the file whole, before the next cell begins.

    Args:
        path: of the file, which need not exist; None: kept in memory alone.
        benchmark: its name.
        facts: of `machine.describe`, now.
        fresh: start anew; what the file holds stays until the first row is there.

    Raises:
        UserError: the file holds something else, or was measured in another setting.
    """

    def __init__(self, path: Path | None, benchmark: str, facts: Mapping[str, object], *, fresh: bool = False) -> None:
        self.path = path
        self.benchmark = benchmark
        self.facts: dict[str, Any] = dict(facts)
        self.rows: list[dict[str, Any]] = []
        if path is not None and not fresh and path.exists():
            content = _read(path, benchmark)
            changed = machine.differences(content["machine"], facts)
            if changed:
                raise UserError(
                    f"{path} was measured in another setting: {'; '.join(changed)}; name another --output, or give "
                    "--fresh to replace it"
                )
            self.facts, self.rows = content["machine"], content["rows"]
        self._others = {name: facts.get(name) for name in machine.BY_ROW if facts.get(name) != self.facts.get(name)}

    @property
    def cells(self) -> set[str]:
        """Keys of the cells that are there."""
        return {row["cell"] for row in self.rows}

    @property
    def measured(self) -> set[str]:
        """Keys of those with numbers, not only with the reason why there are none."""
        return {row["cell"] for row in self.rows if "not_measured" not in row}

    def add(self, cell: str, row: Mapping[str, Any]) -> None:
        """Append the row of a cell, in place of one that it may have.

        Raises:
            UserError: if the file cannot be written.
        """
        self.rows = [before for before in self.rows if before["cell"] != cell]
        self.rows.append(
            {"cell": cell, "time": datetime.now(UTC).isoformat(timespec="seconds")} | self._others | dict(row)
        )
        if self.path is None:
            return
        text = json.dumps({"benchmark": self.benchmark, "machine": self.facts, "rows": self.rows}, indent=1)
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            with partial.open("w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be written: {error.strerror or error}") from error


def _read(path: Path, benchmark: str) -> dict[str, Any]:
    try:
        content = json.loads(read_bounded(path, LARGEST_FILE))
        rows = content["rows"]
        good = isinstance(content["machine"], dict) and isinstance(content["benchmark"], str) and isinstance(rows, list)
        good = good and (content["benchmark"] != benchmark or all(isinstance(row["cell"], str) for row in rows))
    except OSError as error:
        raise UserError(f"--output {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise UserError(f"--output {path} is no file of results, or a damaged one; name another, or give --fresh")
    if content["benchmark"] != benchmark:
        raise UserError(
            f'--output {path} holds results of "{content["benchmark"]}", not of "{benchmark}"; name another, or give '
            "--fresh"
        )
    return content
