"""Ways to spoil a checkpoint as an accident would, or as an enemy would who can seal what was changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slope_dist.checkpoint.format import MANIFEST, encode
from tests.faults.shared import put

SEAL_SIZE = 78
"""Bytes at the end of a manifest that vouch for the rest, by docs/checkpoint-format.md."""

_ELEMENTS = {"F32": "<f4", "BF16": "<u2", "U8": "u1"}


def header_size(data: bytes) -> int:
    """Where the data of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, which may lie about its own length."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def seal(body: bytes) -> bytes:
    """A manifest of any text, in which the closing brace is left out, with a right hash of itself."""
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def content_of(folder: Path) -> dict[str, Any]:
    """What a good manifest says, without its seal."""
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["sha256"]
    return content


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a manifest says, and seal it again."""
    content = content_of(folder)
    change(content)
    put(folder / MANIFEST, encode(content))


def entry_of(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file of these bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def vouch(folder: Path, name: str, data: bytes) -> None:
    """Other bytes in a file, for which the manifest vouches."""
    put(folder / name, data)
    reseal(folder, lambda content: content["files"].update({name: entry_of(data)}))


def change_elements(folder: Path, tensor: str, change: Callable[[np.ndarray], None], piece: int = 0) -> None:
    """Change elements of a tensor ("kind/name") where they lie in one of its pieces, and vouch for the file."""
    entry = content_of(folder)["tensors"][tensor]
    part = entry["fragments"][piece]
    data = bytearray((folder / part["file"]).read_bytes())
    begin = header_size(bytes(data[:8]))
    start, stop = json.loads(data[8:begin])[part["key"]]["data_offsets"]
    dtype = np.dtype(_ELEMENTS[entry["dtype"]])
    change(np.frombuffer(data, dtype, (stop - start) // dtype.itemsize, begin + start))
    vouch(folder, part["file"], bytes(data))


def flip(data: bytes, position: int, bit: int) -> bytes:
    """`data` with one bit the other way."""
    spoilt = bytearray(data)
    spoilt[position] ^= 1 << bit
    return bytes(spoilt)
