"""A pattern is 1:2, 2:4, 2:8 or 4:8, all else is one clear UserError; its share of induced zeros is exact.

Run: pytest tests/sparse/test_pattern.py
"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_dist.errors import UserError
from slope_dist.sparse import Pattern
from tests.sparse.oracle import PATTERNS


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_parse_and_print(n: int, m: int) -> None:
    pattern = Pattern.parse(f"{n}:{m}")
    assert (pattern.n, pattern.m, str(pattern)) == (n, m, f"{n}:{m}")
    assert pattern.density == n / m
    assert pattern.kept(4 * m) == 4 * n
    assert pattern.is_two_four == ((n, m) == (2, 4))
    with pytest.raises(ValueError, match="not a whole number of groups"):
        pattern.kept(4 * m + 1)


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2:4:8", "2/4", "-2:4", "2.0:4", " 2:4", "2:4 ", "dense", "²:4"])
def test_malformed_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="N:M") as raised:
        Pattern.parse(text)
    assert "\n" not in str(raised.value)


@given(st.integers(0, 20), st.integers(0, 20))
def test_other_patterns_are_refused_by_naming_the_good_ones(n: int, m: int) -> None:
    if (n, m) in PATTERNS:
        assert Pattern(n, m).density == n / m
        return
    with pytest.raises(UserError, match="1:2, 2:4, 2:8, 4:8"):
        Pattern(n, m)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_induced_zeros_is_the_expectation_over_all_column_groups(n: int, m: int) -> None:
    expected = 0.0
    for group in product((0, 1), repeat=m):
        kept = sum(group)
        probability = (n / m) ** kept * (1 - n / m) ** (m - kept)
        expected += probability * max(0, kept - n) / m
    assert Pattern(n, m).induced_zeros() == pytest.approx(expected, abs=1e-12)


def test_induced_zeros_has_the_known_values() -> None:
    percent = [round(100 * Pattern(n, m).induced_zeros(), 3) for n, m in PATTERNS]
    assert percent == [12.5, 9.375, 5.84, 6.836]
