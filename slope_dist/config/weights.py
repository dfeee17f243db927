"""The weights of a mixture of corpora, as exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

MOST_PLACES = 100_000
"""Longest period: weights of five digits. A table of it is made at the start."""


def shares(weights: Sequence[Fraction]) -> list[Fraction]:
    """The weights, divided by their sum."""
    total = sum(weights, Fraction(0))
    return [weight / total for weight in weights]


def period(weights: Sequence[Fraction]) -> int:
    """Samples after which the places repeat, and in which every corpus has exactly its share."""
    return lcm(*(share.denominator for share in shares(weights)))
