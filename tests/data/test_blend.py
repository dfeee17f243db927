"""Claim: a mixture's samples come from its corpora as its weights say, at every point of the run, by arithmetic alone.

python -m pytest tests/data/test_blend.py
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slope_dist.config.weights import MOST_PLACES, period, shares
from slope_dist.data.blend import Blend

WEIGHTS = st.lists(st.integers(1, 60).map(Fraction), min_size=1, max_size=6)


def counted(weights: list[Fraction], samples: int) -> np.ndarray:
    """How many of the first n samples each corpus has, for every n: int64 [corpora, samples + 1]."""
    corpora, _ = Blend(weights).places(np.arange(samples))
    rows = [np.concatenate(([0], np.cumsum(corpora == corpus))) for corpus in range(len(weights))]
    return np.array(rows)


@settings(deadline=None, max_examples=150)
@given(weights=WEIGHTS)
def test_the_first_samples_are_within_one_of_the_weights_and_any_in_a_row_within_two(weights):
    k, length = len(weights), 3 * period(weights)
    counts = counted(weights, length)
    bound = 1 - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
    for corpus, share in enumerate(shares(weights)):
        # In units of 1 / denominator, so that nothing is rounded.
        ahead = counts[corpus] * share.denominator - share.numerator * np.arange(length + 1)
        assert np.abs(ahead).max() <= bound * share.denominator
        # The most that any run of samples is off is the distance between the most and the least of its ends.
        assert ahead.max() - ahead.min() <= 2 * bound * share.denominator
        assert ahead[:: period(weights)].tolist() == [0, 0, 0, 0]


def test_any_samples_in_a_row_of_two_corpora_are_within_one_of_the_weights():
    weights = [Fraction("0.7"), Fraction("0.3")]
    counts = counted(weights, 200)
    for begin in range(200):
        for end in range(begin, 201):
            share = Fraction(7, 10) * (end - begin)
            assert abs(int(counts[0, end] - counts[0, begin]) - share) <= 1


def test_nothing_keeps_three_corpora_within_one_sample_everywhere():
    """Why blend.py promises less: of all orders of 5:4:2, none has each run of samples within one."""
    weights, longest = (5, 4, 2), 0

    def extend(order: int, ahead: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]) -> None:
        """Try all next samples; `ahead` is by how much each corpus is before its share, in 1/11 of a sample."""
        nonlocal longest
        longest = max(longest, order)
        for corpus in range(3 if order < 22 else 0):
            now = tuple(a - w + (11 if i == corpus else 0) for i, (a, w) in enumerate(zip(ahead, weights, strict=True)))
            lows, highs = tuple(map(min, least, now)), tuple(map(max, most, now))
            if all(high - low <= 11 for low, high in zip(lows, highs, strict=True)):
                extend(order + 1, now, lows, highs)

    extend(0, (0, 0, 0), (0, 0, 0), (0, 0, 0))
    assert longest < 22


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, samples=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_sample_alone_is_where_it_is_in_company(weights, samples):
    blend = Blend(weights)
    together = blend.places(np.array(samples))
    for index, sample in enumerate(samples):
        alone = blend.places(np.array([sample]))
        assert (alone[0][0], alone[1][0]) == (together[0][index], together[1][index])


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, begin=st.integers(0, 10**12))
@example(weights=[Fraction(5), Fraction(3), Fraction(2)], begin=0)
def test_every_number_of_every_corpus_comes_once_and_in_order(weights, begin):
    corpora, numbers = Blend(weights).places(begin + np.arange(500))
    for corpus in range(len(weights)):
        mine = numbers[corpora == corpus]
        assert np.array_equal(mine, mine[:1] + np.arange(len(mine))) and (mine >= 0).all()
    if begin == 0:
        assert all(numbers[corpora == corpus][:1] == [0] for corpus in set(corpora.tolist()))


def test_the_schedule_is_fixed_for_ever():
    """A resumed run relies on it: another one is a change of format."""
    places, numbers = Blend([Fraction(5), Fraction(3), Fraction(2)]).places(np.arange(13))
    assert places.tolist() == GOLDEN
    assert numbers.tolist() == [GOLDEN[:index].count(corpus) for index, corpus in enumerate(GOLDEN)]


GOLDEN = [0, 1, 0, 2, 0, 1, 0, 2, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("weights", [[], [Fraction(0)], [Fraction(1), Fraction(-1)], [Fraction(1), Fraction(1, 10**6)]])
def test_weights_of_no_schedule_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Blend(weights)


def test_the_longest_period_is_five_digits():
    weights = [Fraction("0.50001"), Fraction("0.3"), Fraction("0.19999")]
    assert Blend(weights).period == MOST_PLACES == 10**5
