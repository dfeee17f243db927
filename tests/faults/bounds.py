"""How often a fault may still get through, given how often it did in so many trials."""

from __future__ import annotations

from math import exp, lgamma, log, log1p

_CONFIDENCE = 0.95


def upper_bound(failures: int, trials: int) -> float:
    """The failure rate that is not exceeded, with 95 % confidence.

    Without failures the rule of three, 3 / trials; else Clopper and Pearson's one-sided bound: the rate at which so few
    failures would be seen in 5 % of all such series.
    """
    if not 0 <= failures <= trials:
        raise ValueError(f"{failures} failures of {trials} trials")
    if failures == 0:
        return min(1.0, 3.0 / trials) if trials else 1.0
    if failures == trials:
        return 1.0
    low, high = failures / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(failures, trials, middle) > 1 - _CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


def _at_most(failures: int, trials: int, rate: float) -> float:
    """Probability of `failures` or fewer in `trials`."""
    return sum(
        exp(
            lgamma(trials + 1)
            - lgamma(count + 1)
            - lgamma(trials - count + 1)
            + count * log(rate)
            + (trials - count) * log1p(-rate)
        )
        for count in range(failures + 1)
    )
