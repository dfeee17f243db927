"""Times of rivals, run in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 50

WARM_SECONDS = 1.0
"""Of the same work before a GPU's first timed round: until then its clock follows a power draw that is not steady."""

SAMPLE_SECONDS = 1e-3
"""A GPU's sample is of as many calls as fill this, at most `MOST_CALLS`."""

MOST_CALLS = 100

FLUSH_BYTES = 256 * 2**20
"""More than any card's L2 cache holds."""


class WrongResultError(Exception):
    """A rival makes something else than it should, so its speed means nothing."""


@dataclass(frozen=True)
class Timing:
    """One rival's time in every round, in seconds, and its ratio to the baseline's in the same round."""

    seconds: list[float]
    ratios: list[float]
    processor_ratios: list[float]
    """Of processor time over all threads: with one thread it tells of a busy machine what the clock cannot."""
    host_seconds: list[float]
    """Until the call returned, which on a GPU is before the work is done."""

    def summary(self) -> dict[str, float]:
        """Medians with quartiles."""
        numbers: dict[str, float] = {"rounds": len(self.seconds), "host_seconds": statistics.median(self.host_seconds)}
        series = {"seconds": self.seconds, "ratio": self.ratios, "processor_ratio": self.processor_ratios}
        for name, values in series.items():
            numbers[name] = statistics.median(values)
            numbers[f"{name}_q1"], numbers[f"{name}_q3"] = _quartiles(values)
        return numbers


def host_excess(summary: Mapping[str, float], dense_host_seconds: float, device: torch.device) -> float | None:
    """What the host takes longer for a call than for the dense one, as a share of the call's time.

    Where the GPU is behind by as much as its queue holds, the host waits for it, in either call: then this says little.

    Args:
        summary: of the call.
        dense_host_seconds: median of the dense one.
        device: on the CPU, where the host's time is all there is, the share is None.
    """
    if device.type != "cuda":
        return None
    return (summary["host_seconds"] - dense_host_seconds) / summary["seconds"]


def _quartiles(numbers: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True)
class _Sample:
    """Seconds a call: until the device was done, of the processor, until the call returned."""

    seconds: float
    processor: float
    host: float


def in_turns(
    rivals: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, *, flush: bool = False
) -> dict[str, Timing]:
    """Time every rival once a round, the order turning by one each round.

    Args:
        rivals: what to run; the first is the baseline of the ratios.
        device: whose time it is: a GPU's is read from its own events, after a second of the same work.
        seconds: about how long to go on, within 5 and 50 rounds.
        flush: empty a GPU's L2 cache before each call, as another layer's weights do between two of one layer.
    """
    names = list(rivals)
    calls = _warm(rivals, device)
    taken: dict[str, list[_Sample]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(_sample(rivals[name], device, calls[name], flush=flush))
    baseline = taken[names[0]]
    return {
        name: Timing(
            [sample.seconds for sample in taken[name]],
            [ours.seconds / base.seconds for ours, base in zip(taken[name], baseline, strict=True)],
            [ours.processor / base.processor for ours, base in zip(taken[name], baseline, strict=True)],
            [sample.host for sample in taken[name]],
        )
        for name in names
    }


def _warm(rivals: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    """Run every rival until the device is steady; how many calls make a sample of each."""
    for run in rivals.values():
        run()
    if device.type != "cuda":
        return dict.fromkeys(rivals, 1)
    once: dict[str, float] = {}
    start = time.perf_counter()
    while not once or time.perf_counter() - start < WARM_SECONDS:
        for name, run in rivals.items():
            once[name] = _sample(run, device, 1).seconds
    return {name: max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / max(taken, 1e-9)))) for name, taken in once.items()}


def _sample(run: Callable[[], object], device: torch.device, calls: int, *, flush: bool = False) -> _Sample:
    wait(device)
    if device.type == "cuda":
        return _sample_on_cuda(run, device, calls, flush)
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    taken = (time.perf_counter() - clock) / calls
    return _Sample(taken, (time.process_time() - processor) / calls, taken)


def _sample_on_cuda(run: Callable[[], object], device: torch.device, calls: int, flush: bool) -> _Sample:
    # Flushed, each call has events of its own.
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    count = calls if flush else 1
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    clock, processor = time.perf_counter(), time.process_time()
    for start, stop in spans:
        # Also where nothing need be flushed: the device is busy while the host queues what is timed, as in a run.
        scratch.zero_()
        start.record()
        for _ in range(calls // len(spans)):
            run()
        stop.record()
    host = (time.perf_counter() - clock) / calls
    wait(device)
    # At least one tick: the processor's clock may not have moved.
    busy = max((time.process_time() - processor) / calls, 1e-9)
    return _Sample(sum(start.elapsed_time(stop) for start, stop in spans) / 1e3 / calls, busy, host)


def wait(device: torch.device) -> None:
    """Until the device has done all it was given; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
