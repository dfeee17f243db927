"""Claim: a curve of very many steps is drawn from few points, and shows every peak; any name may stand above it.

Run: pytest tests/training/test_plot.py
"""

from __future__ import annotations

import random
from pathlib import Path

from slope_dist.training.plot import POINTS, _thinned, plot_losses


def test_few_points_are_drawn_as_they_are() -> None:
    points = [(step, step * 0.5) for step in range(1, POINTS + 1)]
    assert _thinned(points) == ([step for step, _ in points], [value for _, value in points])
    assert _thinned([]) == ([], [])


def test_of_many_the_lowest_and_highest_stay_in_the_order_of_steps() -> None:
    draw = random.Random(5)
    for count in (POINTS + 1, 3 * POINTS - 1, 100_003):
        points = [(step, draw.gauss(5, 1)) for step in range(1, count + 1)]
        points[count // 3] = (count // 3 + 1, 90.0)
        points[count // 2] = (count // 2 + 1, -90.0)
        steps, values = _thinned(points)
        assert POINTS / 4 < len(steps) <= POINTS
        assert steps == sorted(set(steps))
        assert set(zip(steps, values, strict=True)) <= set(points)
        assert max(values) == 90.0 and min(values) == -90.0


def test_a_title_is_no_mathematics(tmp_path: Path) -> None:
    plot_losses([{"step": 1, "loss": 1.0, "phase": "sparse"}], tmp_path / "loss.png", "a$b_$c \\frac")
    assert (tmp_path / "loss.png").stat().st_size > 1000
