"""Small collectives on plain data, as JSON bytes in tensors: torch's object collectives would pickle (rule R7).

All are over the default group, or another that holds the same ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slope_dist.errors import UnfinishedError, UserError, may_pass
from slope_dist.watching.heartbeat import beat

BEAT_SECONDS = 30.0
"""How often one that works alone is heard of; far below what a collective waits for."""

T = TypeVar("T")


def rank() -> int:
    """Global rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where tensors of a group's collectives live."""
    if dist.is_initialized() and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    padded, sizes = _padded(value, group)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return [_value(part[:size]) for part, size in zip(gathered, sizes, strict=True)]


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """Every rank's `value`, in rank order, on rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    padded, sizes = _padded(value, group)
    gathered = [torch.empty_like(padded) for _ in sizes] if rank() == 0 else None
    dist.gather(padded, gathered, dst=0, group=group)
    return None if gathered is None else [_value(part[:size]) for part, size in zip(gathered, sizes, strict=True)]


def broadcast_json(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    data = _bytes(value).to(device(group))
    size = torch.tensor([data.numel()], device=device(group))
    dist.broadcast(size, 0, group=group)
    if rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device(group))
    dist.broadcast(data, 0, group=group)
    return _value(data)


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(data: Tensor) -> Any:
    return json.loads(bytes(data.cpu().numpy()))


def _padded(value: Any, group: dist.ProcessGroup | None) -> tuple[Tensor, list[int]]:
    """This rank's value as bytes, as many on every rank, and how many of them count on each."""
    data = _bytes(value).to(device(group))
    sizes = [torch.zeros(1, dtype=torch.int64, device=device(group)) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=device(group)), group=group)
    counts = [int(size) for size in sizes]
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device(group))
    padded[: data.numel()] = data
    return padded, counts


def agree(error: str | None, *, passing: bool = False) -> None:
    """Let all ranks fail together: the first rank's error is raised on every rank, none goes on alone.

    Args:
        error: this rank's; None if it has none.
        passing: whether the same may succeed later.

    Raises:
        UserError: if any rank passed an error.
        UnfinishedError: the same, if that rank's may pass.
    """
    found = all_gather_json(None if error is None else [error, passing])
    errors = [(index, *each) for index, each in enumerate(found) if each is not None]
    if errors:
        index, text, passes = errors[0]
        raise (UnfinishedError if passes else UserError)(text if index == 0 else f"rank {index}: {text}")


@contextmanager
def together() -> Iterator[None]:
    """Let a `UserError` inside the block, on any rank, be raised on every rank. The block holds no collective.

    Where the error is the first rank's own, that rank raises it as it is, class and all.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as failure:
        own = failure
    try:
        agree(None if own is None else str(own), passing=may_pass(own))
    except UserError:
        if own is not None and rank() == 0:
            raise own from own.__cause__
        raise


def alone(work: Callable[[Callable[[], None]], T]) -> T | None:
    """Let the first rank do what may take longer than a collective may wait; the others hear from it meanwhile.

    Args:
        work: called on the first rank, with a function that it is to call often.

    Returns:
        What `work` returns on the first rank, None on the others.

    Raises:
        UserError: on every rank, what `work` raises. What the first rank cannot tell, since the device by which ranks
            speak is broken, it raises alone.
    """
    result: T | None = None
    raised: BaseException | None = None
    if rank() == 0:
        spoke = time.monotonic()

        def alive() -> None:
            nonlocal spoke
            beat()
            if time.monotonic() - spoke >= BEAT_SECONDS:
                broadcast_json(True)
                spoke = time.monotonic()

        try:
            result = work(alive)
        except BaseException as failure:
            raised = failure
        try:
            broadcast_json(False)
        except Exception:
            # A failure may have broken the device by which ranks speak. It is what is to be told, not that.
            if raised is None:
                raise
            raise raised from raised.__cause__
        if raised is not None and not isinstance(raised, UserError):
            raise raised
    else:
        while broadcast_json(None):
            pass
    try:
        agree(None if raised is None else str(raised), passing=may_pass(raised))
    except UserError:
        if raised is not None:
            # As it is, class and all.
            raise raised from raised.__cause__
        raise
    return result


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sum over all ranks, in fp64."""
    if world_size() == 1:
        return values
    total: Tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()
