"""What is done with rows of text, the same in this process and in others: encode them, or take a sample of them.

A job gets rows in batches and answers each by a `Result` that depends on the batch alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.readers import Document, Lines, Row
from slope_dist.data.sources import MOST_REASONS
from slope_dist.data.tokenizer import Tokenizer

SPLITS = ("train", "valid")

_SAMPLE_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Result:
    """What a job makes of a batch.

    Attributes:
        facts: plain data; `error` is what the first refused row is refused for, or None; `rejected` and `reasons` tell
            of the rows that were left out.
        parts: bytes.
    """

    facts: dict[str, Any]
    parts: list[bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOptions:
    """How rows are treated, whatever is done with them."""

    seed: int
    valid_fraction: float
    skip_bad_rows: bool


class Job(Protocol):
    """Something to do with each batch."""

    def settings(self) -> dict[str, Any]:
        """Plain data that `job_of` makes the same job from."""

    def __call__(self, batch: Sequence[Row]) -> Result:
        """Do it."""


class Encode:
    """Ids of documents, by split.

    The parts are for each of `SPLITS` its tokens (in the dtype of the corpus, each document ended) and the lengths of
    its documents (int32); the facts say, by split, how many documents, tokens and bytes of text that is, and the
    largest id.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path | str, rows: RowOptions):
        """`path` is where another process finds the tokenizer."""
        self._tokenizer = tokenizer
        self._path = path
        self._rows = rows
        self._dtype = token_dtype(tokenizer.vocab_size)

    def settings(self) -> dict[str, Any]:
        """Where the tokenizer is, and how rows are treated."""
        return {"job": "encode", "path": str(self._path), "rows": asdict(self._rows)}

    def __call__(self, batch: Sequence[Row]) -> Result:
        """Encode the documents of a batch."""
        facts, documents = _documents(batch, skip_bad_rows=self._rows.skip_bad_rows)
        ids = self._tokenizer.encode_batch([document.text for document in documents])
        end = self._tokenizer.end_of_document
        tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        text_bytes = dict.fromkeys(SPLITS, 0)
        facts["without_text"] = 0
        for document, own in zip(documents, ids, strict=True):
            text = document.text.encode()
            if not self._tokenizer.spells(own, text) or (own == end).any():
                # The rows before it come first: one of them may be refused too.
                facts["error"] = (
                    f"the tokenizer changes the text of {document.name}; use one that is lossless, such as one "
                    "trained here"
                )
                break
            if not text:
                facts["without_text"] += 1
                continue
            valid = is_valid_document(document.name, self._rows.seed, self._rows.valid_fraction)
            split = "valid" if valid else "train"
            tokens[split].append(np.append(own, end).astype(self._dtype))
            text_bytes[split] += len(text)
        facts["splits"] = {}
        parts = []
        for split, arrays in tokens.items():
            whole = np.concatenate(arrays) if arrays else np.empty(0, self._dtype)
            parts += [whole.tobytes(), np.array([len(array) for array in arrays], dtype=np.int32).tobytes()]
            facts["splits"][split] = {
                "documents": len(arrays),
                "tokens": len(whole),
                "text_bytes": text_bytes[split],
                "max_id": int(whole.max(initial=0)),
            }
        return Result(facts, parts)


class Sample:
    """Pieces of the text of training documents, which the seed and the documents' names choose; a part each."""

    def __init__(self, share: float, rows: RowOptions):
        """`share` of the pieces are taken."""
        self._share = share
        self._rows = rows

    def settings(self) -> dict[str, Any]:
        """How much is taken, and how rows are treated."""
        return {"job": "sample", "share": self._share, "rows": asdict(self._rows)}

    def __call__(self, batch: Sequence[Row]) -> Result:
        """Take pieces of the documents of a batch."""
        facts, documents = _documents(batch, skip_bad_rows=self._rows.skip_bad_rows)
        seed = self._rows.seed
        parts = [
            document.text[start : start + _SAMPLE_CHUNK].encode()
            for document in documents
            if not is_valid_document(document.name, seed, self._rows.valid_fraction)
            for start in range(0, len(document.text), _SAMPLE_CHUNK)
            if _unit_hash("tokenizer", seed, document.name, start) < self._share
        ]
        return Result(facts, parts)


def job_of(settings: dict[str, Any]) -> Job:
    """The job that has these settings."""
    rows = RowOptions(**settings["rows"])
    if settings["job"] == "sample":
        return Sample(settings["share"], rows)
    return Encode(load_tokenizer(settings["path"]), settings["path"], rows)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The dtype that ids below `vocab_size` are stored in."""
    return np.uint16 if vocab_size <= 65535 else np.int32


def is_valid_document(name: str, seed: int, valid_fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its name and the seed alone."""
    return _unit_hash("split", seed, name) < valid_fraction


def _unit_hash(*parts: object) -> float:
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


def _documents(batch: Sequence[Row], *, skip_bad_rows: bool) -> tuple[dict[str, Any], list[Document]]:
    """The documents of a batch, up to the first bad row where such are refused."""
    reasons: list[str] = []
    rejected = 0
    documents = []
    for row in _rows(batch):
        if isinstance(row, Document):
            documents.append(row)
            continue
        rejected += 1
        if len(reasons) < MOST_REASONS:
            reasons.append(row.reason)
        if not skip_bad_rows:
            break
    error = reasons[0] if reasons and not skip_bad_rows else None
    return {"rejected": rejected, "reasons": reasons, "error": error}, documents


def _rows(batch: Sequence[Row]) -> Iterator[Any]:
    for row in batch:
        if isinstance(row, Lines):
            yield from row.rows()
        else:
            yield row
