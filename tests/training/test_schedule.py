"""Learning rates: their values at the edges, no jumps but where one is asked for, and a function of the step alone.

Run: pytest tests/training/test_schedule.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slope_dist.config import Config, derive, load_config
from slope_dist.training.schedule import learning_rates
from tests.runs import write_config

STEPS, WARMUP, PEAK, LAST = 100, 10, 0.01, 0.001


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def make(**changes: Any) -> Config:
        values = {
            "training__steps": STEPS,
            "training__warmup_steps": WARMUP,
            "training__learning_rate": PEAK,
            "training__min_learning_rate": LAST,
            "adapters__fraction": 0.2,
        }
        return load_config(write_config(tmp_path, tmp_path, **values | changes))

    return make


def rates(config: Config, kind: str = "base") -> list[float]:
    """By step; [0] is not used."""
    first = derive(config).first_adapter_step
    return [0.0] + [learning_rates(config, step, first)[kind] for step in range(1, config.training.steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_edges(schedule: str, config: Any) -> None:
    found = rates(config(training__schedule=schedule))
    assert found[1] == pytest.approx(PEAK / WARMUP)
    assert found[WARMUP] == PEAK
    assert found[STEPS] == pytest.approx(PEAK if schedule == "constant" else LAST)
    # Half way down.
    middle = found[(STEPS + WARMUP) // 2]
    assert middle == pytest.approx(PEAK if schedule == "constant" else (PEAK + LAST) / 2)
    if schedule == "cosine":
        assert PEAK - found[WARMUP + 1] < 0.1 * (PEAK - LAST) / (STEPS - WARMUP)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_step_jumps(schedule: str, config: Any) -> None:
    found = rates(config(training__schedule=schedule))
    largest = max(PEAK / WARMUP, 1.6 * (PEAK - LAST) / (STEPS - WARMUP))
    assert max(abs(b - a) for a, b in pairwise(found)) <= largest * 1.0001
    decay = found[WARMUP:]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(decay))


def test_no_warmup_starts_near_the_peak(config: Any) -> None:
    found = rates(config(training__schedule="linear", training__warmup_steps=0))
    assert found[1] == pytest.approx(LAST + (PEAK - LAST) * (1 - 1 / STEPS))
    assert found[STEPS] == pytest.approx(LAST)


def test_adapters_follow(config: Any) -> None:
    plain = config(adapters__rank=0)
    assert derive(plain).first_adapter_step == STEPS + 1
    followed = config()
    assert derive(followed).first_adapter_step == 81
    assert rates(followed) == rates(followed, "adapters") == rates(plain)


@pytest.mark.parametrize("policy", ["rewarm_adapters", "rewarm_all"])
def test_second_warmup(policy: str, config: Any) -> None:
    peak = 0.004
    changed = config(adapters__learning_rate_policy=policy, adapters__peak_learning_rate=peak, adapters__warmup_steps=5)
    base, adapters, before = rates(changed), rates(changed, "adapters"), rates(config())
    assert base[:81] == before[:81]
    assert base[81:] == (before[81:] if policy == "rewarm_adapters" else adapters[81:])
    assert adapters[81:86] == pytest.approx([peak * share / 5 for share in range(1, 6)])
    assert adapters[STEPS] == pytest.approx(LAST)
    assert adapters[85:] == sorted(adapters[85:], reverse=True)


def test_a_peak_below_the_last_rate_stays_there(config: Any) -> None:
    changed = config(adapters__learning_rate_policy="rewarm_all", adapters__peak_learning_rate=LAST / 2)
    assert rates(changed)[81:] == pytest.approx([LAST / 2] * 20)


def test_one_step_of_adapters_gets_a_rate(config: Any) -> None:
    changed = config(
        adapters__fraction=0.001, adapters__learning_rate_policy="rewarm_adapters", adapters__peak_learning_rate=0.1
    )
    assert derive(changed).first_adapter_step == STEPS
    assert rates(changed, "adapters")[STEPS] == pytest.approx(LAST)
