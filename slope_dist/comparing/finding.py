"""What the comparison of ranks finds."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slope_dist.parallel import collectives


@dataclass(frozen=True)
class Finding:
    """Something to tell: when it begins, when it changes and when it is over, not at every step.

    Attributes:
        line: for people, in one line.
        row: for metrics.jsonl, without the step.
        scalars: for TensorBoard, by name.
        damage: whether the state of the run is wrong, and not only its speed.
    """

    line: str
    row: Mapping[str, Any]
    scalars: Mapping[str, float] = field(default_factory=dict)
    damage: bool = False


class Hosts:
    """The machine of every rank, asked for once. Collective at its first use."""

    def __init__(self) -> None:
        self._names: list[str] | None = None

    def __getitem__(self, rank: int) -> str:
        return self.names()[rank]

    def names(self) -> list[str]:
        """In rank order."""
        if self._names is None:
            self._names = [str(name) for name in collectives.all_gather_json(socket.gethostname())]
        return self._names
