"""Logical tensors of a checkpoint in bounded chunks: memory does not grow with the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from math import prod
from typing import cast

import torch
from torch import Tensor

from slope_dist.checkpoint.format import DTYPES, CheckpointError, StoredTensor
from slope_dist.checkpoint.reader import Checkpoint
from slope_dist.parallel.fragments import Kind, whole
from slope_dist.transfer import Transfer

CHUNK_ELEMENTS = 2**20
"""Most elements that exist of a tensor at one time."""


class TensorStream:
    """Reads logical tensors piece by piece, and refuses files that change meanwhile.

    Files are mapped into memory: what another program writes into them would appear in the middle of a result, and
    where it cut them short the process would be killed. So each file's size and time of change are looked at around
    every read. Mapped pages count as this process's memory in some views, and are the system's to take back.

    Args:
        checkpoint: where from.
        transfer: told of the bytes that are read.

    Raises:
        CheckpointError: if a file is no longer there or no longer of its size.
    """

    def __init__(self, checkpoint: Checkpoint, transfer: Transfer | None = None) -> None:
        self._checkpoint = checkpoint
        self._transfer = transfer or Transfer()
        self._stamps = {name: self._stamp(name) for name in checkpoint.manifest.files}
        for name, entry in checkpoint.manifest.files.items():
            if self._stamps[name][0] != entry.bytes:
                raise self._changed(name, f"expected {entry.bytes} bytes, found {self._stamps[name][0]}")

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
            files = _files(tensor, start, stop)
            self._check(files)
            chunk = self._checkpoint.read(name, cast(Kind, kind), whole(tensor.shape), start, stop)
            self._check(files)
            self._transfer.add(chunk.nbytes)
            yield start, chunk

    def _check(self, files: Iterable[str]) -> None:
        for name in files:
            if self._stamp(name) != self._stamps[name]:
                raise self._changed(name, "expected it to stay as it was when it was opened, found it changed")

    def _stamp(self, name: str) -> tuple[int, int, int]:
        try:
            found = os.lstat(self._checkpoint.path / name)
        except OSError as error:
            raise self._changed(name, f"cannot be read: {error}") from error
        return found.st_size, found.st_mtime_ns, found.st_ino

    def _changed(self, name: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.path}: {name}: {text}")


def num_bytes(tensor: StoredTensor) -> int:
    """Bytes of a whole logical tensor."""
    return prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def squared_norm(elements: Tensor) -> float:
    """Sum of squares of a 1-D tensor, in fp64."""
    numbers = elements.double()
    return float(torch.dot(numbers, numbers))


def _files(tensor: StoredTensor, start: int, stop: int) -> set[str]:
    """The files that a read of row-major elements [start, stop) of the tensor looks into, and perhaps a few more."""
    everything, row = whole(tensor.shape), prod(tensor.shape[1:])
    files = set()
    for part in tensor.fragments:
        if part.rectangle == everything:
            low, high = part.start, part.stop
        else:
            low, high = (bound * row for bound in part.rectangle[0])
        if low < stop and start < high:
            files.add(part.file)
    return files
