"""safetensors files whose tensors come one after another, in shards with an index as Hugging Face's loaders read them.

The library's own writer takes all tensors of a file at once; here a block of rows exists at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from slope_dist.checkpoint.format import DTYPES
from slope_dist.checkpoint.tensor_file import Entry, header_of, write_hashed
from slope_dist.errors import UserError
from slope_dist.export.target import write_file
from slope_dist.transfer import Transfer

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a file, unless one alone is larger."""

KNOWN_DTYPES = DTYPES | {"I64": torch.int64}
"""safetensors' names of the dtypes that inference files may hold."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: its dtype.
        rows: makes it, as consecutive blocks along its first dimension; nothing is kept of a block that was used.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Planned:
        """One that is there already, such as a few numbers."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: [tensor])


def total_bytes(tensors: Iterable[Planned]) -> int:
    """Size of all elements."""
    return sum(tensor.bytes for tensor in tensors)


def header_bytes(tensors: Iterable[Planned]) -> int:
    """About what the header of a file says of them."""
    return sum(len(tensor.name) + 90 for tensor in tensors)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The numbers of the tensor called `name` as `dtype`.

    Raises:
        UserError: if one is beyond its range.
    """
    found = tensor.to(dtype)
    if found.is_floating_point() and not found.isfinite().all():
        largest = float(tensor.abs().max())
        raise UserError(f"{name}: {largest:.4g} is beyond the range of {dtype}; give a --dtype that holds it")
    return found


def write_shards(
    folder: Path,
    stem: str,
    tensors: Sequence[Planned],
    transfer: Transfer,
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write `stem`.safetensors, or several and `stem`.safetensors.index.json where they do not fit into one.

    Args:
        folder: where.
        stem: "model", say.
        tensors: in the order in which files are filled with them; within a file wider elements lie first.
        transfer: told of the bytes that are written.
        shard_bytes: of tensors in a file.
        metadata: of each file's header, beside {"format": "pt"}.

    Returns:
        SHA-256 of each file of tensors, by name.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and total_bytes(shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [
        f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        for number in range(1, count + 1)
    ]
    hashes = {}
    for name, shard in zip(names, shards, strict=True):
        hashes[name] = write_file_of_tensors(folder / name, shard, transfer, metadata=metadata)
    if count > 1:
        index = {
            "metadata": {"total_size": total_bytes(tensors)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        write_file(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())
    return hashes


def write_file_of_tensors(
    path: Path, tensors: Sequence[Planned], transfer: Transfer, *, metadata: dict[str, str] | None = None
) -> str:
    """One safetensors file, on disk on return; returns its SHA-256 in hex."""
    # Widest elements first, so that each tensor is aligned, which readers that map the file need.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = header_of(
        (Entry(tensor.name, _name(tensor.dtype), tensor.shape, tensor.bytes) for tensor in ordered),
        {"format": "pt", **(metadata or {})},
    )
    return write_hashed(path, header, _all_bytes(ordered), transfer)[1]


def _all_bytes(tensors: Iterable[Planned]) -> Iterator[memoryview]:
    for tensor in tensors:
        written = 0
        for block in tensor.rows():
            if block.dtype != tensor.dtype or tuple(block.shape[1:]) != tensor.shape[1:]:
                raise ValueError(f"{tensor.name}: a block of {block.dtype} {list(block.shape)} does not fit its plan")
            data = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
            written += data.nbytes
            yield data
        if written != tensor.bytes:
            raise ValueError(f"{tensor.name}: {tensor.bytes} bytes were planned, {written} came")


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in KNOWN_DTYPES.items() if known == dtype)
