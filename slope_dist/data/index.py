"""The index of Megatron-core's token files, checked byte for byte.

What reads it elsewhere trusts it: offsets outside the file, counts in the billions or another dtype would end in a
struct error, an endless allocation or silently other tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slope_dist.errors import UserError

AGAIN = "prepare the corpus again with tools/prepare_data.py"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Megatron-core's codes of integer dtypes; its float dtypes are no token ids.
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What an index file says.

    Attributes:
        path: the file.
        dtype: of the tokens.
        sequences: runs of tokens; a document is made of one or more.
        documents: how many.
        tokens: in all.
    """

    path: Path
    dtype: np.dtype[Any]
    sequences: int
    documents: int
    tokens: int

    def first_token(self, document: int) -> int:
        """Where a document begins, in tokens; that behind the last one is the end of all."""
        pointers_at = _HEADER.size + 4 * self.sequences
        boundaries_at = pointers_at + 8 * self.sequences
        with self.path.open("rb") as stream:
            sequence = _integer(stream, boundaries_at + 8 * document)
            if sequence == self.sequences:
                return self.tokens
            return _integer(stream, pointers_at + 8 * sequence) // self.dtype.itemsize


def read_index(path: Path, bin_bytes: int) -> Index:
    """Read a Megatron-core .idx file and check that it describes exactly a .bin file of `bin_bytes` bytes.

    Sequences must lie one after another without holes, and documents must cover them, so that any run of tokens is
    one slice of the .bin file.

    Raises:
        UserError: the index is truncated, damaged, of another kind, or of another .bin file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{path} is not a Megatron-core index: {_found(size, header)}; {AGAIN}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{path} has version {version} and dtype code {code}, not version 1 and an integer dtype; {AGAIN}"
        )
    expected = _HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes where its header of {sequences} sequences and {boundaries} document "
            f"boundaries needs {expected}: truncated or damaged; {AGAIN}"
        )
    if sequences == 0 or boundaries < 2:
        raise UserError(f"{path} holds no document; {AGAIN} from text that has some")
    dtype = np.dtype(_DTYPES[code])
    raw = np.memmap(path, mode="r")
    lengths_at = _HEADER.size
    pointers_at = lengths_at + 4 * sequences
    boundaries_at = pointers_at + 8 * sequences
    end = 0
    for start in range(0, sequences, _CHUNK):
        count = min(_CHUNK, sequences - start)
        lengths = np.frombuffer(raw, "<i4", count, lengths_at + 4 * start).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", count, pointers_at + 8 * start)
        if lengths.min() < 0:
            bad = int(np.flatnonzero(lengths < 0)[0])
            raise UserError(f"{path} gives sequence {start + bad} a negative length {lengths[bad]}: damaged; {AGAIN}")
        ends = end + np.cumsum(lengths * dtype.itemsize)
        begins = np.concatenate(([end], ends[:-1]))
        if (pointers != begins).any():
            bad = int(np.flatnonzero(pointers != begins)[0])
            raise UserError(
                f"{path} puts sequence {start + bad} at byte {pointers[bad]}, but the lengths before it make "
                f"{begins[bad]}: damaged; {AGAIN}"
            )
        end = int(ends[-1])
    previous = 0
    for start in range(0, boundaries, _CHUNK):
        count = min(_CHUNK, boundaries - start)
        marks = np.frombuffer(raw, "<i8", count, boundaries_at + 8 * start)
        before = np.concatenate(([previous], marks[:-1]))
        wrong = marks < before
        # The first document begins with the first sequence.
        wrong[0] |= start == 0 and marks[0] != 0
        if wrong.any():
            bad = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{path} has document boundary {start + bad} at sequence {marks[bad]}, out of order: damaged; {AGAIN}"
            )
        previous = int(marks[-1])
    if previous != sequences:
        raise UserError(f"{path} ends its last document at sequence {previous}, not {sequences}: damaged; {AGAIN}")
    if end != bin_bytes:
        raise UserError(
            f"{path.with_suffix('.bin')} has {bin_bytes} bytes where its index says {end}: truncated, or of "
            f"another corpus; {AGAIN}"
        )
    return Index(path=path, dtype=dtype, sequences=sequences, documents=boundaries - 1, tokens=end // dtype.itemsize)


def _integer(stream: BinaryIO, offset: int) -> int:
    stream.seek(offset)
    return int(np.frombuffer(stream.read(8), "<i8")[0])


def _found(size: int, header: bytes) -> str:
    return f"{size} bytes, fewer than a header" if len(header) < _HEADER.size else "its first bytes are others"
