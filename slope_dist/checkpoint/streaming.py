"""Logical tensors of a checkpoint in bounded chunks: memory does not grow with the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import cast

import torch
from torch import Tensor

from slope_dist.checkpoint.format import DTYPES, StoredTensor
from slope_dist.checkpoint.reader import Checkpoint
from slope_dist.parallel.fragments import Kind, whole
from slope_dist.transfer import Transfer

CHUNK_ELEMENTS = 2**20
"""Most elements that exist of a tensor at one time."""


class TensorStream:
    """Reads logical tensors piece by piece.

    Mapped pages count as this process's memory in some views, and are the system's to take back.

    Args:
        checkpoint: where from.
        transfer: told of the bytes that are read.
    """

    def __init__(self, checkpoint: Checkpoint, transfer: Transfer | None = None) -> None:
        self._checkpoint = checkpoint
        self._transfer = transfer or Transfer()

    def begin(self, keys: Iterable[str]) -> None:
        """Tell the transfer that these tensors are going to be read."""
        self._transfer.begin(sum(num_bytes(self._checkpoint.manifest.tensors[key]) for key in keys))

    def chunks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """All elements of a tensor in row-major order, at most `CHUNK_ELEMENTS` at a time.

        Whole rows, where a row is no longer than that. Tensors of one shape are cut alike, whatever their dtypes.

        Args:
            key: "<kind>/<global name>", one of the manifest's.

        Yields:
            the row-major position of the first element, and the elements: 1-D, in the stored dtype.

        Raises:
            CheckpointError: if a file does not hold what the manifest says, or changes.
        """
        tensor = self._checkpoint.manifest.tensors[key]
        kind, _, name = key.partition("/")
        size, row = prod(tensor.shape), prod(tensor.shape[1:])
        step = CHUNK_ELEMENTS // row * row if 0 < row <= CHUNK_ELEMENTS else CHUNK_ELEMENTS
        for start in range(0, size, step):
            stop = min(size, start + step)
            chunk = self._checkpoint.read(name, cast(Kind, kind), whole(tensor.shape), start, stop)
            self._transfer.add(chunk.nbytes)
            yield start, chunk


def num_bytes(tensor: StoredTensor) -> int:
    """Bytes of a whole logical tensor."""
    return prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def squared_norm(elements: Tensor) -> float:
    """Sum of squares of a 1-D tensor, in fp64."""
    numbers = elements.double()
    return float(torch.dot(numbers, numbers))
