"""safetensors files written part by part: the library's own writer takes all tensors at once, and hashes none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from slope_dist.transfer import Transfer


class Entry(NamedTuple):
    """A tensor of a file: its name, safetensors' name of its dtype, its shape, and its size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def header_of(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a file begins with whose tensors lie one behind the other, in this order.

    Those with wider elements should come first: each is then aligned to them, which readers that map the file need.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_hashed(path: Path, header: bytes, parts: Iterable[memoryview], transfer: Transfer) -> tuple[int, str]:
    """Write a new file, on disk on return.

    Args:
        path: of the file.
        header: its beginning.
        parts: the rest; each is used before the next is asked for.
        transfer: told of the bytes that are written.

    Returns:
        its size, and its SHA-256 in hex.
    """
    digest, size = hashlib.sha256(header), len(header)
    with durable_file(path) as file:
        file.write(header)
        transfer.add(len(header))
        for data in parts:
            digest.update(data)
            file.write(data)
            size += data.nbytes
            transfer.add(data.nbytes)
    return size, digest.hexdigest()


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, on disk when the block ends. An error says which file it was, which the system's does not."""
    try:
        with open(path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
