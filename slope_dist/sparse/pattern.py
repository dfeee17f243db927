"""N:M patterns: at most n kept entries in every m consecutive ones along the dimension a product reduces over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import comb

from slope_dist.errors import UserError

SUPPORTED = ((1, 2), (2, 4), (2, 8), (4, 8))

CUT_MULTIPLE = 8
"""Shards are cut on multiples of this in both dimensions (rule R3): it is a whole number of groups for every supported
pattern and a whole byte of metadata, so a shard's packed bytes are a slice of the whole's."""


@dataclass(frozen=True)
class Pattern:
    """`n` kept of every `m` consecutive entries."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if (self.n, self.m) not in SUPPORTED:
            names = ", ".join(f"{n}:{m}" for n, m in SUPPORTED)
            raise UserError(f"sparsity pattern {self.n}:{self.m} is not supported; supported are {names}")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4"; anything else raises `UserError`."""
        n, colon, m = text.partition(":")
        if not (colon and all(part.isascii() and part.isdigit() and len(part) < 4 for part in (n, m))):
            raise UserError(f'sparsity pattern "{text[:40]}" is not of the form N:M, such as "2:4"')
        return cls(int(n), int(m))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of kept entries, n / m."""
        return self.n / self.m

    @property
    def is_two_four(self) -> bool:
        """Whether the 2-bit index codec (and so every compressed product) applies."""
        return (self.n, self.m) == (2, 4)

    def kept(self, size: int) -> int:
        """Kept entries K of a row of `size` entries, which must be a multiple of m."""
        if size % self.m:
            raise ValueError(f"a row of {size} entries is not a whole number of groups of {self.m}")
        return size // self.m * self.n

    def induced_zeros(self) -> float:
        """Share of all entries that the second pruning removes from a randomly pruned matrix.

        Lemma of arXiv 2405.16325 section 4.3: with s = n / m,
        sum over j in n+1..m of C(m, j) s^j (1 - s)^(m - j) (j - n) / m.
        For 2:8 this gives 5.84 %; the paper prints 3.39 %, which does not follow from its own formula.
        """
        s = self.density
        return sum(
            comb(self.m, j) * s**j * (1 - s) ** (self.m - j) * (j - self.n) / self.m
            for j in range(self.n + 1, self.m + 1)
        )


def pattern_of(name: str, default: str, exceptions: Sequence[str]) -> Pattern:
    """The pattern of the layer called `name`: of the first of "GLOB=N:M" whose glob matches, else the default.

    Raises:
        UserError: if it is none.
    """
    entry = exception_of(name, exceptions)
    return Pattern.parse(default if entry is None else entry.rpartition("=")[2])


def exception_of(name: str, exceptions: Sequence[str]) -> str | None:
    """The first of "GLOB=N:M" whose glob matches `name`, if any."""
    return next((entry for entry in exceptions if fnmatchcase(name, entry.rpartition("=")[0])), None)
