"""Candidates for one product: first seen to be right, then timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative norm that a product may be off the fp32 product of the same numbers."""

ROUNDS = 11
SAMPLE_SECONDS = 1e-3
MOST_CALLS = 100

FLUSH_BYTES = 2**28
"""Written to push all else out of a card's L2 cache, which is smaller on every one."""

Timer = Callable[[Mapping[str, Callable[[], object]], torch.device, bool], dict[str, float]]
"""Median seconds of each of several calls on a device; True: with nothing of their operands in a cache."""


def why_wrong(found: Tensor, expected: Tensor) -> str | None:
    """What a product is off by, if by more than its dtype allows: both [T, O], the second in fp32."""
    difference = torch.linalg.vector_norm(found.float() - expected)
    error = float(difference / torch.linalg.vector_norm(expected).clamp_min(1e-30))
    # Not `error > bound`: NaN must not pass.
    return None if error <= BOUNDS[found.dtype] else f"wrong: off the reference by {error:.1e}"


def median_seconds(calls: Mapping[str, Callable[[], object]], device: torch.device, cold: bool) -> dict[str, float]:
    """Time calls in turns, so that what else happens to the device falls on all of them alike.

    Each sample is of as many calls as take about a millisecond. Where few tokens meet a weight, its bytes are the time,
    and in a model they never lie in a cache: such calls are timed `cold`, a card's cache emptied before each.
    """
    time_calls = _cpu_seconds
    if device.type == "cuda":
        time_calls = _cold_cuda_seconds if cold else _cuda_seconds
    repeats = {}
    for name, call in calls.items():
        time_calls(call, 1, device)
        once = time_calls(call, 3, device) / 3
        repeats[name] = max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / max(once, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            taken[name].append(time_calls(call, repeats[name], device) / repeats[name])
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _cuda_seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(times):
        call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def _cold_cuda_seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(times):
        scratch.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize(device)
    return sum(start.elapsed_time(stop) for start, stop in events) / 1e3


def _cpu_seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start
