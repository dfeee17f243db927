"""Which corpus each sample of a mixture comes from: arithmetic on the weights, without a state.

Sample n is the m-th of corpus c, and both follow from n and the weights alone. The places repeat with the common
denominator of the weights, the period. Within it they are Tijdeman's schedule ("The chairman assignment problem",
Discrete Mathematics 32, 1980): of the first n samples, corpus i of k has its share w_i n to within 1 - 1/(2k - 2) of a
sample, which no schedule betters for all weights. So of any samples in a row it has its share to within 2 - 1/(k - 1):
one sample for two corpora. For three and more no order keeps all of them to within one: of the weights 5:4:2, say,
none does.

B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from slope_dist.config.weights import MOST_PLACES, period, shares


class Blend:
    """The places of corpora in the order of samples.

    Args:
        weights: above 0, in any unit, one for each corpus; their `period` is at most `MOST_PLACES`.

    Attributes:
        period: of the weights.
    """

    def __init__(self, weights: Sequence[Fraction]):
        if not weights or min(weights) <= 0 or period(weights) > MOST_PLACES:
            raise ValueError(f"weights {[str(weight) for weight in weights]}")
        self.period = period(weights)
        self._counts = np.array([int(share * self.period) for share in shares(weights)])
        self._corpora = _schedule(self._counts.tolist())
        # Of each place, how many earlier ones of the period are its corpus's.
        self._earlier = np.empty_like(self._corpora)
        for corpus in range(len(weights)):
            mine = self._corpora == corpus
            self._earlier[mine] = np.arange(mine.sum())

    def places(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus of each sample, and its number among the samples of that corpus, from 0: int64 [B] to two of them."""
        periods, within = np.divmod(np.asarray(samples, dtype=np.int64), self.period)
        corpora = self._corpora[within]
        return corpora, periods * self._counts[corpora] + self._earlier[within]


def _schedule(counts: list[int]) -> np.ndarray:
    """The corpora of one period, of whose places corpus i has counts[i]: int64 [sum of counts]."""
    places, rivals = sum(counts), len(counts)
    if rivals == 1:
        return np.zeros(places, dtype=np.int64)
    # All in units of 1 / (parts x places), so that nothing is rounded: 1 - 1/parts is the most that a share may lag.
    parts = 2 * rivals - 2
    common = lcm(*counts)
    taken = [0] * rivals
    schedule = np.empty(places, dtype=np.int64)
    for place in range(places):
        # Who would not be too far ahead with this one; of those, who would first be too far behind without.
        ready = [i for i in range(rivals) if parts * (counts[i] * (place + 1) - taken[i] * places) >= places]
        chosen = min(ready, key=lambda i: (parts * (taken[i] + 1) - 1) * (common // counts[i]))
        taken[chosen] += 1
        schedule[place] = chosen
    return schedule
