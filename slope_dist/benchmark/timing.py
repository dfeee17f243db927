"""Times of rivals, run in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 50


class WrongResultError(Exception):
    """A rival makes something else than it should, so its speed means nothing."""


@dataclass(frozen=True)
class Timing:
    """One rival's time in every round, in seconds, and its ratio to the baseline's in the same round."""

    seconds: list[float]
    ratios: list[float]
    processor_ratios: list[float]
    """Of processor time over all threads: with one thread it tells of a busy machine what the clock cannot."""

    def summary(self) -> dict[str, float]:
        """Medians with quartiles."""
        numbers: dict[str, float] = {"rounds": len(self.seconds)}
        series = {"seconds": self.seconds, "ratio": self.ratios, "processor_ratio": self.processor_ratios}
        for name, values in series.items():
            numbers[name] = statistics.median(values)
            numbers[f"{name}_q1"], numbers[f"{name}_q3"] = _quartiles(values)
        return numbers


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
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(_time(rivals[name], device))
    baseline = taken[names[0]]
    return {
        name: Timing(
            [clock for clock, _ in taken[name]],
            [ours[0] / base[0] for ours, base in zip(taken[name], baseline, strict=True)],
            [ours[1] / base[1] for ours, base in zip(taken[name], baseline, strict=True)],
        )
        for name in names
    }


def _time(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    wait(device)
    clock, processor = time.perf_counter(), time.process_time()
    run()
    wait(device)
    return time.perf_counter() - clock, time.process_time() - processor


def wait(device: torch.device) -> None:
    """Until the device has done all it was given; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
