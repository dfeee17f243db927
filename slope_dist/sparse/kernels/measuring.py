"""Candidates for one product: first seen to be right, then timed in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

ROUNDINGS = 4
"""Of a result, at most: parts of the product, the product, then with the addend, then with the bias."""

CHUNK = 2**24
"""Elements that are looked at in one go, so that a check takes 64 MiB a copy and not one of a whole output."""

ROUNDS = 11
FIRST_ROUNDS = 3
FINALISTS = 4
"""A library has dozens of algorithms, most of them far behind: 3 samples, whose median one disturbance cannot move,
tell the few that may be the fastest, and those alone are timed as often as a difference of a percent asks for."""

DENSE = "dense"
"""Name of the call that the others are judged beside; it is timed as often as the best."""

SAMPLE_SECONDS = 1e-3
MOST_CALLS = 100

FLUSH_BYTES = 2**28
"""Written to push all else out of a card's L2 cache, which is smaller on every one, and to keep it busy meanwhile."""

CALLS_HIDDEN = 3
"""Calls that the host queues, in 20 us each, while a card fills `FLUSH_BYTES`: 67 us and more at 4 TB/s."""

Timer = Callable[[Mapping[str, Callable[[], object]], torch.device, bool], dict[str, float]]
"""Median seconds of each of several calls on a device; True: with nothing of their operands in a cache."""


def bound(dtype: torch.dtype, terms: int) -> float:
    """How far sums of `terms` products may be off in a dtype, relative to what was added up.

    A rounding to the dtype is off by eps / 2 at most. Sums are kept in fp32, each step of which is off by 2^-24 of the
    sum so far: at random, so after `terms` of them by the square root. 4 times that for the largest of 10^9 elements
    (6 standard deviations of what is mostly less than one rounding), and for tensor cores, which cut off instead of
    rounding but add 16 or more products in one step.
    """
    return ROUNDINGS * torch.finfo(dtype).eps / 2 + 4 * math.sqrt(terms) * 2.0**-24


def off_by(
    found: Tensor, product: Tensor, terms: int, *, bias: Tensor | None = None, addend: Tensor | None = None
) -> str | None:
    """By how much a result is off where that is more than its dtype allows, in words; None: nowhere.

    As a whole, in each row, in each column and in each element: of a large output a lost tile, row or column is too
    little to be seen in the whole.

    Args:
        found: [T, O].
        product: X W^T in fp32, [T, O].
        terms: how many products are added up for an element.
        bias, addend: added to the product, [O] and [T, O].
    """
    limit = bound(found.dtype, terms)
    numbers = torch.finfo(found.dtype)
    # What small fp16 numbers are off by, whatever their size.
    least = numbers.smallest_normal * numbers.eps
    rows, columns = found.shape
    row_errors, row_sizes = product.new_empty(rows), product.new_empty(rows)
    column_errors, column_sizes = product.new_zeros(columns), product.new_zeros(columns)
    for part, error, size in _parts(found, product, bias, addend):
        error, size = error.square_(), size.square_()
        row_errors[part], row_sizes[part] = error.sum(1), size.sum(1)
        column_errors += error.sum(0)
        column_sizes += size.sum(0)
    error_of_all, size_of_all = (float(squares.sum().sqrt()) for squares in (row_errors, row_sizes))
    # Nowhere `error > limit`: NaN must not pass.
    if not error_of_all <= limit * size_of_all + least * math.sqrt(rows * columns):
        return f"by {error_of_all / max(size_of_all, 1e-30):.1e}"
    # A column of few tokens may be small by chance, what it is added up from is not: one more row, of the usual size.
    column_sizes += row_sizes.sum() / rows / columns
    sides = (("row", row_errors, row_sizes, columns), ("column", column_errors, column_sizes, rows))
    for side, errors, sizes, length in sides:
        errors, sizes = errors.sqrt(), sizes.sqrt()
        place = _first(~(errors <= limit * sizes + least * math.sqrt(length)))
        if place is not None:
            ratio = float(errors[place] / sizes[place].clamp_min(1e-30))
            return f"by {ratio:.1e} in {side} {place[0]}"
    # Beside its own size an element has that of its row or column: one that is small by chance is made of larger terms.
    usual_of_row, usual_of_column = (row_sizes / columns).sqrt(), (column_sizes / rows).sqrt()
    for part, error, size in _parts(found, product, bias, addend):
        size += torch.maximum(usual_of_row[part, None], usual_of_column)
        place = _first(~(error <= limit * size + least))
        if place is not None:
            ratio = float(error[place] / size[place].clamp_min(1e-30))
            return f"by {ratio:.1e} in element {part.start + place[0]}, {place[1]}"
    return None


def why_wrong(
    found: Tensor, product: Tensor, terms: int, *, bias: Tensor | None = None, addend: Tensor | None = None
) -> str | None:
    """The same as a reason to leave a candidate out."""
    off = off_by(found, product, terms, bias=bias, addend=addend)
    return None if off is None else f"wrong: off the reference {off}"


def _parts(
    found: Tensor, product: Tensor, bias: Tensor | None, addend: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows after others: which, how far each element is off, and the sum of the sizes that it is made of."""
    rows, columns = found.shape
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        expected, size = product[part], product[part].abs()
        for term in (addend if addend is None else addend[part], bias):
            if term is not None:
                expected = expected + term.to(product.dtype)
                size += term.to(product.dtype).abs()
        yield part, (found[part].to(product.dtype) - expected).abs_(), size


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """Where the first True is."""
    return tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else None


def median_seconds(calls: Mapping[str, Callable[[], object]], device: torch.device, cold: bool) -> dict[str, float]:
    """Time calls in turns, so that what else happens to the device falls on all of them alike.

    All in a few rounds, then the fastest and `DENSE` in more. One that is left behind is given the ratio to the fastest
    that it had in the first rounds, so that it is never before it.

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

    def medians(names: Iterable[str], rounds: int) -> dict[str, float]:
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, seconds in taken.items():
                seconds.append(time_calls(calls[name], repeats[name], device) / repeats[name])
        return {name: statistics.median(seconds) for name, seconds in taken.items()}

    first = medians(calls, FIRST_ROUNDS)
    rivals = sorted(first.keys() - {DENSE}, key=lambda name: first[name])
    if not rivals:
        return medians(calls, ROUNDS)
    finalists = rivals[:FINALISTS]
    final = medians((name for name in calls if name in finalists or name == DENSE), ROUNDS)
    scale = final[rivals[0]] / max(first[rivals[0]], 1e-9)
    return {name: final[name] if name in final else first[name] * scale for name in calls}


def _cuda_seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    # Keeps the device busy while the host queues the calls, which in a model it does beforehand.
    for _ in range(1 + times // CALLS_HIDDEN):
        scratch.zero_()
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
