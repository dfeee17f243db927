"""The token files of a corpus while it is written, and a journal of how far they are.

The journal's first line says what is made of what. Each other line states how many batches of the text are on the
disk, with a hash of that text, the sizes of the files, and their hashes. What lies behind the sizes of the last whole
line was never stated and is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slope_dist.data.jobs import SPLITS, Result, token_dtype
from slope_dist.files import read_bounded

JOURNAL = "journal.jsonl"
LENGTHS = {f"{split}.lengths" for split in SPLITS}

BLOCK_BYTES = 16 << 20

_COMMIT_SECONDS = 2.0
_MAX_JOURNAL_BYTES = 2**30
_CHUNK = 1 << 20
_LENGTH = np.dtype("<i4")
# Megatron-core's codes of the dtypes that tokens are stored in.
_CODES = {np.uint16: 8, np.int32: 4}


class DamagedJournalError(Exception):
    """What an earlier attempt left cannot be gone on with; says why."""


def read_journal(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The journal's first line and its last whole one; None where it has no two."""
    try:
        lines = read_bounded(folder / JOURNAL, _MAX_JOURNAL_BYTES).split(b"\n")[:-1]
        header, *states = (json.loads(lines[0]), *map(json.loads, lines[-1:] if len(lines) > 1 else ()))
    except (OSError, ValueError, IndexError, RecursionError):
        return None
    if not isinstance(header, dict) or not states or not isinstance(states[0], dict):
        return None
    return header, states[0]


def begin_journal(folder: Path, header: dict[str, Any]) -> None:
    """Write the first line."""
    with (folder / JOURNAL).open("wb") as stream:
        stream.write(json.dumps(header).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


class TokenFiles:
    """The tokens of all splits and the lengths of their documents, in files that only grow.

    Attributes:
        state: what the journal's next line will state.
    """

    def __init__(self, folder: Path, vocab_size: int, end: int, state: dict[str, Any] | None = None):
        """Begin with empty files, or go on from what `state` states.

        Raises:
            DamagedJournalError: a file is not as stated.
        """
        self._folder = folder
        self._dtype = token_dtype(vocab_size)
        self.state: dict[str, Any] = state or {
            "batches": 0,
            "input": "",
            "without_text": 0,
            "rejected": 0,
            "reasons": [],
            "splits": {split: {"documents": 0, "tokens": 0, "text_bytes": 0, "max_id": end} for split in SPLITS},
            "sha256": {},
        }
        if set(self.state["splits"]) != set(SPLITS):
            raise DamagedJournalError("its journal is of other splits")
        self._streams: dict[str, BinaryIO] = {}
        self._hashes = {}
        for split, counts in self.state["splits"].items():
            sizes = {"bin": counts["tokens"] * np.dtype(self._dtype).itemsize}
            sizes["lengths"] = counts["documents"] * _LENGTH.itemsize
            for kind, size in sizes.items():
                name = f"{split}.{kind}"
                self._hashes[name] = self._restore(folder / name, size, self.state["sha256"].get(name))
        for name in self._hashes:
            self._streams[name] = (folder / name).open("ab")
        self._journal = (folder / JOURNAL).open("r+b")
        self._cut_journal()
        self._committed = time.monotonic()

    def _restore(self, path: Path, size: int, sha256: str | None) -> Any:
        """The file cut to `size`, and the running hash of what is left of it."""
        digest = hashlib.sha256()
        with path.open("ab+") as stream:
            stream.truncate(size)
            stream.seek(0)
            while data := stream.read(_CHUNK):
                digest.update(data)
        if size and digest.hexdigest() != sha256:
            raise DamagedJournalError(f"{path.name} is not what the journal states")
        return digest

    def _cut_journal(self) -> None:
        """Without the half line that a kill may leave."""
        self._journal.seek(0)
        whole = sum(len(line) for line in self._journal if line.endswith(b"\n"))
        self._journal.truncate(whole)
        self._journal.seek(whole)

    def add(self, result: Result, input_digest: str) -> None:
        """Add a batch: what `Encode` made of it, and the hash of the text up to its end."""
        state, facts = self.state, result.facts
        parts = iter(result.parts)
        for split in SPLITS:
            for kind in ("bin", "lengths"):
                data = next(parts)
                self._streams[f"{split}.{kind}"].write(data)
                self._hashes[f"{split}.{kind}"].update(data)
            counts, new = state["splits"][split], facts["splits"][split]
            for name in ("documents", "tokens", "text_bytes"):
                counts[name] += new[name]
            counts["max_id"] = max(counts["max_id"], new["max_id"])
        state["batches"] += 1
        state["input"] = input_digest
        state["without_text"] += facts["without_text"]
        if time.monotonic() - self._committed >= _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Put all on the disk, then state it."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        self.state["sha256"] = {name: digest.hexdigest() for name, digest in self._hashes.items()}
        self._journal.write(json.dumps(self.state).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._committed = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Write the indices and return the manifest's `splits`."""
        self.commit()
        splits = {}
        for split, counts in self.state["splits"].items():
            index = self._folder / f"{split}.idx"
            write_index(index, self._folder / f"{split}.lengths", self._dtype)
            splits[split] = counts | {
                "bin_bytes": counts["tokens"] * np.dtype(self._dtype).itemsize,
                "bin_sha256": self.state["sha256"][f"{split}.bin"],
                "bin_blocks_sha256": blocks_sha256(self._folder / f"{split}.bin"),
                "idx_bytes": index.stat().st_size,
                "idx_sha256": file_sha256(index),
            }
        return splits

    def close(self) -> None:
        """Close the files, whatever is in them."""
        for stream in (*self._streams.values(), self._journal):
            try:
                stream.close()
            except OSError:
                # What it could not write was never stated.
                continue


def write_index(path: Path, lengths: Path, dtype: type[np.uint16] | type[np.int32]) -> None:
    """Megatron-core's index of documents of these lengths (a file of int32), one sequence each, one after another."""
    count = lengths.stat().st_size // _LENGTH.itemsize
    with path.open("wb") as index, lengths.open("rb") as stream:

        def each(convert: Callable[[np.ndarray], np.ndarray]) -> None:
            stream.seek(0)
            while data := stream.read(_CHUNK * _LENGTH.itemsize):
                index.write(convert(np.frombuffer(data, _LENGTH)).tobytes())

        end = 0

        def starts(some: np.ndarray) -> np.ndarray:
            nonlocal end
            ends = end + np.cumsum(some.astype("<i8") * np.dtype(dtype).itemsize)
            begins = np.concatenate([np.array([end], "<i8"), ends[:-1]])
            end = int(ends[-1])
            return begins

        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, _CODES[dtype], count, count + 1))
        each(lambda some: some)
        each(starts)
        for start in range(0, count + 1, _CHUNK):
            index.write(np.arange(start, min(start + _CHUNK, count + 1), dtype="<i8").tobytes())


def blocks_sha256(path: Path) -> list[str]:
    """SHA-256 of each `BLOCK_BYTES` of a file, in hex: where the whole is another, they say about where."""
    blocks = []
    with path.open("rb") as stream:
        while data := stream.read(BLOCK_BYTES):
            blocks.append(hashlib.sha256(data).hexdigest())
    return blocks


def file_sha256(path: Path, passed: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hex; `passed` is told of the bytes that are read."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(_CHUNK):
            digest.update(data)
            passed(len(data))
    return digest.hexdigest()
