"""Times of rivals, run in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 50


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival in every round, and its share of the baseline's time in the same round."""

    seconds: list[float]
    ratios: list[float]

    def summary(self) -> dict[str, float]:
        """Medians with quartiles."""
        low, high = _quartiles(self.seconds)
        ratio_low, ratio_high = _quartiles(self.ratios)
        return {
            "seconds": statistics.median(self.seconds),
            "seconds_q1": low,
            "seconds_q3": high,
            "ratio": statistics.median(self.ratios),
            "ratio_q1": ratio_low,
            "ratio_q3": ratio_high,
            "rounds": len(self.seconds),
        }


def _quartiles(numbers: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


def in_turns(rivals: Mapping[str, Callable[[], None]], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time every rival once a round, the order turning by one each round.

    Args:
        rivals: what to run; the first is the baseline of the ratios.
        device: what to wait for before the clock is read.
        seconds: about how long to go on, within 5 and 50 rounds.
    """
    names = list(rivals)
    for run in rivals.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(_time(rivals[name], device))
    baseline = taken[names[0]]
    return {
        name: Timing(taken[name], [ours / base for ours, base in zip(taken[name], baseline, strict=True)])
        for name in names
    }


def _time(run: Callable[[], None], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done all it was given; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
