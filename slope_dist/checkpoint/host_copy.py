"""A rank's state in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slope_dist.parallel.fragments import Fragment

_LARGEST_BLOCK, _SMALLEST_BLOCK = 2**28, 2**20
_ALIGNMENT = 256
"""Bytes: of every dtype, and of what a GPU copies at its full speed."""


Make = Callable[[int], Tensor]


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class PinnedBlocks:
    """Pinned memory, of which buffers are cut.

    torch rounds every pinned tensor up to a power of two, which for weights of 9216 x 4608 is 1.6 times their size. So
    whole powers of two are asked for, and what one buffer leaves of a block others fill.

    Args:
        make: from a number of bytes to a tensor of them.

    Attributes:
        bytes: of all blocks.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._rests: list[Tensor] = []
        self.bytes = 0

    def cut(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D buffer.

        Raises:
            RuntimeError: if there is too little memory.
        """
        size = elements * dtype.itemsize
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        fitting = [rest for rest in self._rests if rest.numel() >= taken]
        if fitting:
            block = min(fitting, key=torch.Tensor.numel)
            self._rests = [rest for rest in self._rests if rest is not block]
        else:
            # Blocks grow with what is held, lest a small model take a large one.
            usual = min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, _power_of_two(self.bytes // 8)))
            block = self._make(max(usual, _power_of_two(taken)))
            self.bytes += block.numel()
        if taken < block.numel():
            self._rests.append(block[taken:])
        return block[:size].view(dtype)


def _power_of_two(size: int) -> int:
    """The next one from `size` on."""
    return 1 << max(size - 1, 0).bit_length()


class HostCopy:
    """One state in host memory. Its buffers serve all saves: a rank holds the bytes of what it writes once more.

    Args:
        make: of pinned blocks, for tests on CPUs: all buffers are then cut of those, as they are for GPUs.
    """

    def __init__(self, make: Make | None = None) -> None:
        self._make = make
        self._forget()

    def _forget(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._blocks = PinnedBlocks(self._make or _pinned)
        self._afresh = False

    @property
    def bytes(self) -> int:
        """Host memory in use."""
        # All tensors of a rank lie on its one device.
        return self._blocks.bytes or sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copies of the fragments that this rank writes, in place of those that were taken before.

        Raises:
            MemoryError, RuntimeError: if there is too little memory; the copy is then empty.
        """
        if self._afresh:
            # What is not saved any more left gaps that nothing fills.
            self._forget()
        before, self._buffers = self._buffers, {}
        copies = []
        try:
            for fragment in fragments:
                if not fragment.write or fragment.start == fragment.stop:
                    continue
                live = fragment.tensor.detach().reshape(-1)
                key = (*fragment.key, fragment.rectangle, fragment.start, fragment.stop, live.dtype)
                buffer = before.pop(key, None)
                if buffer is None:
                    buffer = self._buffer(live)
                buffer.copy_(live, non_blocking=True)
                self._buffers[key] = buffer
                copies.append(replace(fragment, tensor=buffer))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except BaseException:
            self._forget()
            raise
        self._afresh = bool(self._blocks.bytes and before)
        return copies

    def _buffer(self, live: Tensor) -> Tensor:
        """Pinned for a GPU's tensor, so that its copy runs at the full speed of the bus, beside the next one."""
        if live.is_cuda or self._make is not None:
            return self._blocks.cut(live.numel(), live.dtype)
        return torch.empty(live.shape, dtype=live.dtype)
