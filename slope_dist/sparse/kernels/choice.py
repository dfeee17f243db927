"""How one product is computed, by what was measured of all ways, and why: for a user, and for a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slope_dist.sparse.kernels.candidates import Candidate, Route
from slope_dist.sparse.kernels.vendor import NO_MEMORY

WORST_RATIO = 1.02
"""A product that takes longer than this times the dense one is said to."""

NOT_DETERMINISTIC = "not deterministic"


@dataclass(frozen=True)
class Choice:
    """How one product is computed, and why.

    Attributes:
        candidate: what computes it.
        seconds: median of each candidate that was right.
        dense_seconds: of the product over a dense weight, which is not there in a run.
        rejected: why each of the others was not taken.
    """

    candidate: Candidate
    seconds: dict[str, float]
    dense_seconds: float
    rejected: dict[str, str]

    @property
    def label(self) -> str:
        """Name of the candidate."""
        return self.candidate.label

    @property
    def route(self) -> Route:
        """What it does."""
        return self.candidate.route

    @property
    def vendor(self) -> str:
        """Library that it uses, or ""."""
        return self.candidate.vendor

    @property
    def algorithm(self) -> str:
        """The library's algorithm, or ""."""
        return self.candidate.algorithm

    @property
    def ratio(self) -> float:
        """Its time beside that of the dense product."""
        return self.seconds[self.label] / self.dense_seconds

    @property
    def why(self) -> str:
        """The choice in words."""
        others = sorted((seconds, label) for label, seconds in self.seconds.items() if label != self.label)
        text = f"{self.ratio:.2f}x the time of dense"
        if others:
            text += f"; next best: {others[0][1]}, {others[0][0] / self.dense_seconds:.2f}x"
        if self.route == "expand" and not others:
            text += "; nothing else was right" if self.rejected else "; nothing else is there"
        if self.ratio > WORST_RATIO:
            text += f"; {100 * (self.ratio - 1):.0f} % slower than dense: no way that keeps the weight compressed is"
            text += " as fast, and a dense copy of it is not held (rule R1)"
        return text

    @property
    def failed(self) -> str:
        """The candidates that were wrong or did not run, in words: how many, and one of them."""
        reasons = {label: reason for label, reason in self.rejected.items() if reason != NOT_DETERMINISTIC}
        if not reasons:
            return ""
        label, reason = next(iter(reasons.items()))
        return f"; {len(reasons)} failed, such as {label}: {reason}"

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON; without what there was only no memory for."""
        return {
            "label": self.label,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "rejected": {label: why for label, why in self.rejected.items() if not why.startswith(NO_MEMORY)},
        }
