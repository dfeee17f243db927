"""A rank that is slower than the others is told from them within 50 steps, once, by rank and host; quiet ones never.

Slow is a rank whose probe has 1.3 times or twice the work. Where that must be told the work is counted, not timed: of
two cores of one machine one may be a fifth slower than the other. What is timed here has twice the work, and 1,000
steps of equal ranks, which raise no alarm, are marked slow.

Run: pytest tests/comparing/test_stragglers.py
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.comparing.finding import Hosts
from slope_dist.comparing.stragglers import FEWEST, WINDOW, Measurement, Probe, Scores, Stragglers
from tests.distributed import run_ranks
from tests.runs import rows_of, train, watch_engines, write_config

THRESHOLD = 0.85
"""Above what 1.3 times the work scores."""
LOOKS = 10
"""Within 50 steps at the default interval of 5."""


def slow_down(factor: float) -> None:
    """Let the probes of this (forked) process take `factor` times as long."""
    Probe.PRODUCTS = {device: round(products * factor) for device, products in Probe.PRODUCTS.items()}


def counted(probe: Probe) -> float:
    """In place of the time that a probe takes: a ten-thousandth of a second for each product that it makes."""
    made, multiply = 0, torch.mm

    def count(*arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        return multiply(*arguments, **keywords)

    torch.mm = count
    try:
        probe._work()
    finally:
        torch.mm = multiply
    return made / 10_000


def looks(factor: float, slow_rank: int) -> list[list[Any]]:
    """Look 3 x `LOOKS` times; rank `slow_rank` is slow in the middle third. For each look, what was found."""
    Probe._once = counted  # type: ignore[method-assign]
    stragglers = Stragglers(THRESHOLD, Hosts())
    found = []
    products = Probe.PRODUCTS
    for number in range(3 * LOOKS):
        slow = LOOKS <= number < 2 * LOOKS and torch.distributed.get_rank() == slow_rank
        if slow:
            slow_down(factor)
        with stragglers.loading():
            pass
        found.append([dict(finding.row["straggler"]) for finding in stragglers.look()])
        Probe.PRODUCTS = products
    return found


@pytest.mark.parametrize(("ranks", "slow", "factor"), [(2, 0, 1.3), (2, 1, 2.0), (3, 1, 1.3)])
def test_a_slow_rank_is_found_and_forgiven(ranks: int, slow: int, factor: float) -> None:
    results = run_ranks(looks, ranks, factor, slow)
    assert all(found == results[0] for found in results), "every rank keeps the same book"
    rows = [(number, row) for number, found in enumerate(results[0]) for row in found]
    assert [row["slow"] for _, row in rows] == [True, False]
    assert all((row["rank"], row["what"], row["host"]) == (slow, "compute", socket.gethostname()) for _, row in rows)
    (began, row), (ended, _) = rows
    # With the fourth bad score of seven, and with the fourth good one.
    assert (began, ended) == (LOOKS + WINDOW // 2, 2 * LOOKS + WINDOW // 2)
    assert row["score"] < THRESHOLD and row["own_score"] == row["score"]


def alike(ranks: int, slow: dict[int, float] | None = None) -> list[Measurement]:
    return [Measurement(0.002 * (slow or {}).get(rank, 1.0), 0.001, 0.1) for rank in range(ranks)]


def test_single_bad_measurements_do_not_count() -> None:
    scores = Scores(4, THRESHOLD, own_best=True)
    for number in range(10 * WINDOW):
        # Three of seven, one after the other, and as bad as can be.
        assert scores.add(alike(4, {2: 50.0} if number % WINDOW > 3 else None)) == []
    assert scores.score(2, "compute") == 1.0


def test_a_rank_is_named_once_for_each_change() -> None:
    scores = Scores(5, THRESHOLD, own_best=False)
    for _ in range(WINDOW):
        assert scores.add(alike(5)) == []
    changes = [scores.add(alike(5, {3: 2.0})) for _ in range(3 * WINDOW)]
    assert [change for change in changes if change] == [[(3, "compute", True)]]
    assert changes[WINDOW // 2] == [(3, "compute", True)]
    # Between the threshold and what it takes to be forgiven nothing is said.
    assert [c for _ in range(3 * WINDOW) for c in scores.add(alike(5, {3: 1 / 0.87}))] == []
    assert [c for _ in range(3 * WINDOW) for c in scores.add(alike(5))] == [(3, "compute", False)]


def test_from_the_start_it_takes_a_few_measurements() -> None:
    scores = Scores(2, THRESHOLD, own_best=False)
    changes = [scores.add(alike(2, {1: 2.0})) for _ in range(FEWEST)]
    assert changes == [[], [], [], [(1, "compute", True)]]
    assert scores.score(1, "compute") == 0.5 and scores.score(0, "compute") == 1.0


def test_all_ranks_may_fall_below_their_own_best() -> None:
    for own_best, expected in ((True, [(0, "compute", True), (1, "compute", True)]), (False, [])):
        scores = Scores(2, THRESHOLD, own_best=own_best)
        for _ in range(WINDOW):
            scores.add(alike(2))
        found = [change for _ in range(WINDOW) for change in scores.add(alike(2, {0: 1.5, 1: 1.5}))]
        assert found == expected
        assert scores.own_score(0) == pytest.approx(1 / 1.5)


def test_loading_counts_by_its_share_of_a_step() -> None:
    scores = Scores(3, THRESHOLD, own_best=False)
    # A hundred times as long as elsewhere, and yet a hundredth of a step.
    small = [Measurement(0.002, 0.00001 if rank else 0.001, 0.1) for rank in range(3)]
    assert [change for _ in range(WINDOW) for change in scores.add(small)] == []
    large = [Measurement(0.002, 0.001 if rank else 0.031, 0.1) for rank in range(3)]
    assert [change for _ in range(WINDOW) for change in scores.add(large)] == [(0, "loading", True)]
    assert scores.score(0, "loading") == pytest.approx(0.7)


def test_the_probe_leaves_random_streams_alone() -> None:
    before = torch.get_rng_state()
    probe = Probe(torch.device("cpu"))
    probe.seconds()
    assert torch.equal(torch.get_rng_state(), before)


def slow_run(config: str, factor: float, onset: int) -> None:
    """Train; from step `onset` on rank 1 computes slower and takes long to load."""
    from slope_dist.training import trainer

    def watch(event: str, engine: Any, step: Any) -> None:
        if event == "after step" and step == onset - 1 and torch.distributed.get_rank() == 1:
            slow_down(factor)
            batch = trainer.BatchReader.batch

            def late(*arguments: Any) -> Any:
                time.sleep(0.1)
                return batch(*arguments)

            trainer.BatchReader.batch = late  # type: ignore[method-assign]

    watch_engines(watch)
    train(config)


def test_a_run_says_and_records_it_once(corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training__steps": 12, "watch__straggler_interval": 1}
    run_ranks(slow_run, 2, str(write_config(tmp_path, corpus, **changes)), 2.0, 3)
    rows = [row for row in rows_of(tmp_path / "run") if "straggler" in row]
    assert {(row["straggler"]["rank"], row["straggler"]["what"]) for row in rows} == {(1, "compute"), (1, "loading")}
    assert len(rows) == 2 and all(row["straggler"]["slow"] and row["step"] <= 3 + WINDOW for row in rows)


def quiet_run(config: str) -> list[list[float]]:
    """Train; the scores of this rank at every look."""
    seen: list[list[float]] = []
    look = Stragglers.look

    def watched(self: Stragglers) -> Any:
        found = look(self)
        seen.append([self.scores.score(rank, what) for rank in (0, 1) for what in ("compute", "loading")])
        return found

    Stragglers.look = watched  # type: ignore[method-assign]
    train(config)
    return seen


@pytest.mark.slow
def test_a_thousand_quiet_steps_raise_no_alarm(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, training__steps=1000, training__micro_batch_size=4)
    seen = run_ranks(quiet_run, 2, str(config), timeout=900.0)[0]
    assert len(seen) == 200
    lowest = [min(row[index] for row in seen) for index in range(4)]
    print(f"lowest scores, compute and loading of each rank: {', '.join(f'{score:.3f}' for score in lowest)}")
    assert [row for row in rows_of(tmp_path / "run") if "straggler" in row] == []


@pytest.mark.slow
def test_a_rank_that_becomes_slow_is_found_within_fifty_steps(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, training__steps=100, training__micro_batch_size=4)
    run_ranks(slow_run, 2, str(config), 2.0, 51)
    rows = [row for row in rows_of(tmp_path / "run") if "straggler" in row]
    found = {row["straggler"]["what"]: row["step"] for row in rows}
    print(f"slow from step 51 on: {found}")
    assert found.keys() == {"compute", "loading"} and all(50 < step <= 100 for step in found.values())
