"""Tensors that need not fit into memory, for as long as a process works on them."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_ALIGNMENT = 64


class Scratch:
    """Tensors in a file without a name, mapped: the system writes them out where memory runs short.

    The file is gone when the last of its tensors is, however the process ends.

    Args:
        folder: on whose file system it is.
        plan: shape and dtype of each tensor, by key.

    Attributes:
        bytes: its size.

    Raises:
        OSError: if there is no room. It is taken whole: to touch a page that found none would end the process.
    """

    def __init__(self, folder: Path, plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.bytes = size_of(plan)
        self._places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        start = 0
        for key, (shape, dtype) in plan.items():
            self._places[key] = (start, shape, dtype)
            start += _room(shape, dtype)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.bytes)
            else:
                file.truncate(self.bytes)
            self._map = mmap.mmap(file.fileno(), self.bytes)
        self._flat = torch.frombuffer(self._map, dtype=torch.uint8)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Tensor:
        """The tensor itself: zeros until something is written into it."""
        start, shape, dtype = self._places[key]
        return self._flat[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def let_go(self) -> None:
        """Unmap all pages; they come back, as they are, when they are touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def size_of(plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of the file that holds these tensors."""
    return sum(_room(shape, dtype) for shape, dtype in plan.values())


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
