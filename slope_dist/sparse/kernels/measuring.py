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

Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], dict[str, float]]
"""Median seconds of each of several calls on a device."""


def why_wrong(found: Tensor, expected: Tensor) -> str | None:
    """What a product is off by, if by more than its dtype allows: both [T, O], the second in fp32."""
    difference = torch.linalg.vector_norm(found.float() - expected)
    error = float(difference / torch.linalg.vector_norm(expected).clamp_min(1e-30))
    # Not `error > bound`: NaN must not pass.
    return None if error <= BOUNDS[found.dtype] else f"wrong: off the reference by {error:.1e}"


def median_seconds(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Time calls in turns, so that what else happens to the device falls on all of them alike.

    Each sample is of as many calls as take about a millisecond.
    """
    time_calls = _cuda_seconds if device.type == "cuda" else _cpu_seconds
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


def _cpu_seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start
