"""Text to a corpus on disk: a folder that appears whole or not at all.

A corpus folder holds `train.bin` and `train.idx`, `valid.bin` and `valid.idx` (Megatron-core's indexed dataset: one
sequence a document, ended by the end-of-document id), `tokenizer.model`, and `manifest.json`, which has the counts,
sizes and SHA-256 of the others.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from slope_dist.data.readers import Document
from slope_dist.data.sources import Source, embedded_source
from slope_dist.data.tokenizer import NEWLINE, Tokenizer, train_tokenizer
from slope_dist.errors import UserError

if TYPE_CHECKING:
    from slope_dist.config.schema import Config

FORMAT = 1
SPLITS = ("train", "valid")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"

_PARTIAL_MARK = "being-prepared-by-slope-dist"
_OUR_FILES = {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")}
_OUR_FILES |= {TOKENIZER, MANIFEST, _PARTIAL_MARK}
_TOKENIZER_BYTES = 32 << 20
_TOKENIZER_CHUNK = 1 << 16
_BATCH_CHARACTERS = 1 << 22
_PLAIN_LINE_SECONDS = 5.0


def megatron_indexed_dataset() -> ModuleType:
    """Megatron-core's indexed dataset module, imported at first use: the import takes seconds."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The dtype that ids below `vocab_size` are stored in."""
    return np.uint16 if vocab_size <= 65535 else np.int32


def is_valid_document(name: str, seed: int, valid_fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its name and the seed alone."""
    return _unit_hash("split", seed, name) < valid_fraction


def _unit_hash(*parts: object) -> float:
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


def prepare(
    source: Source,
    folder: Path | str,
    *,
    vocab_size: int | None,
    valid_fraction: float,
    seed: int,
    tokenizer: Path | str | None = None,
) -> dict[str, Any]:
    """Write the corpus of `source` into `folder`, which must not exist or be empty, and return its manifest.

    Args:
        source: the documents. Documents without text are left out and counted.
        folder: final place; until all is written, a sibling named `<folder>.partial` is used.
        vocab_size: ids of the tokenizer trained on the training split, or the most that a given one may have
            (None: any number).
        valid_fraction: share of the documents for validation, above 0 and below 1.
        seed: decides the split and what the tokenizer is trained on.
        tokenizer: SentencePiece model to use instead of training one.

    Raises:
        UserError: bad input, a folder that holds something, a split without documents, a disk that is full.

    The same source, arguments and library versions give the same bytes. After an interruption nothing is at `folder`.
    """
    if not 0.0 < valid_fraction < 1.0:
        raise UserError(f"validation fraction {valid_fraction} is out of range; use one above 0 and below 1")
    folder = Path(folder)
    given = Tokenizer.load(tokenizer) if tokenizer is not None else None
    if given is not None and vocab_size is not None and given.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer} has {given.vocab_size} ids, more than the vocabulary of {vocab_size}; "
            "use a larger vocabulary or a smaller tokenizer"
        )
    try:
        with _staged(folder) as partial:
            if given is None:
                if vocab_size is None:
                    raise ValueError("neither a tokenizer nor the size of one to train")
                used = _train_on(source, vocab_size, valid_fraction, seed)
            else:
                used = given
            (partial / TOKENIZER).write_bytes(used.model)
            splits, empty = _write_splits(source, partial, used, valid_fraction, seed)
            manifest = {
                "format": FORMAT,
                "vocab_size": used.vocab_size,
                "end_of_document": used.end_of_document,
                "dtype": token_dtype(used.vocab_size).__name__,
                "tokenizer_sha256": used.sha256,
                "source": source.description,
                "documents_without_text": empty,
                "rows_rejected": source.rejections.count,
                "valid_fraction": valid_fraction,
                "seed": seed,
                "splits": splits,
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write corpus {folder}: {_reason(error)}") from error
    finally:
        # Above all where nothing is left: they say why.
        _tell_of_rejections(source)
    return manifest


def prepare_if_absent(config: Config) -> bool:
    """Prepare `config.data.source` into `config.data.folder` unless something is there; True if it was done.

    For one process of a run; the others wait. Whether what is there is a sound corpus, `Corpus.open` tells, and
    whether it is what the config would have made, `Corpus.differs_from`.

    Raises:
        UserError: there is no corpus and no source to make it from, or as for `prepare`.
    """
    if config.data.folder is None:
        return False
    folder = Path(config.data.folder)
    try:
        # A pair of files may be meant, as Megatron-LM's preprocessing makes it.
        if _holds_something(folder) or folder.with_name(f"{folder.name}.idx").exists():
            return False
    except OSError as error:
        raise UserError(f"cannot read corpus {folder} (data.folder): {_reason(error)}") from error
    if config.data.source is None:
        raise UserError(
            f"no corpus in {folder} (data.folder); make one with tools/prepare_data.py, "
            'or set data.source to "python-stdlib"'
        )
    prepare(
        embedded_source(config.data.source),
        folder,
        vocab_size=config.model.vocab_size,
        valid_fraction=config.data.valid_fraction,
        seed=config.run.seed,
        tokenizer=config.data.tokenizer,
    )
    return True


def _holds_something(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _reason(error: OSError) -> str:
    what = error.strerror or str(error)
    return what if error.filename is None else f"{what} ({error.filename})"


def _refuse_if_taken(folder: Path) -> None:
    if _holds_something(folder):
        raise UserError(
            f"{folder} already holds a corpus or other files, which are never overwritten; "
            "remove it or name another folder"
        )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder `<folder>.partial` that becomes `folder`, on disk, if the body succeeds, and goes if it fails.

    A mark inside it is locked while its process lives, which tells a leftover of ours from one in use.
    """
    _refuse_if_taken(folder)
    # A last name that is ".." or a link would put the sibling elsewhere than the folder that it is to become.
    folder = Path(os.path.realpath(folder))
    _refuse_if_taken(folder)
    if folder == Path(os.path.realpath(os.curdir)):
        raise UserError(f"{folder} is the current folder, which cannot be replaced by a corpus; name one below it")
    partial = folder.with_name(folder.name + ".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = _lock(partial)
    try:
        # Another process may have finished between the first look and the lock.
        _refuse_if_taken(folder)
        _remove_ours(partial, keep_mark=True)
        yield partial
        for path in sorted(partial.iterdir()):
            _fsync(path)
        _fsync(partial)
        os.rename(partial, folder)
        _fsync(folder.parent)
        (folder / _PARTIAL_MARK).unlink()
    except BaseException:
        # Whatever stops the clean-up, the next attempt does it again; the error to report is the first one.
        with suppress(OSError):
            _remove_ours(partial)
            partial.rmdir()
        raise
    finally:
        os.close(mark)


def _lock(partial: Path) -> int:
    """Make or take over the folder, and return the file descriptor that holds its lock."""
    while True:
        partial.mkdir(exist_ok=True)
        # A process that finishes meanwhile moves the folder away under our hands: then look again.
        with suppress(FileNotFoundError):
            names = set(os.listdir(partial))
            if names and (_PARTIAL_MARK not in names or names - _OUR_FILES):
                raise UserError(f"{partial} is in the way and was not made by an earlier attempt; move it")
            mark = os.open(partial / _PARTIAL_MARK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(mark), os.stat(partial / _PARTIAL_MARK)):
                    return mark
            except BlockingIOError as error:
                os.close(mark)
                raise UserError(f"another process is writing {partial}; wait for it to end") from error
            except BaseException:
                os.close(mark)
                raise
            os.close(mark)


def _remove_ours(partial: Path, *, keep_mark: bool = False) -> None:
    """Remove the files that we write; the mark goes last, as without it the rest is not known to be ours."""
    for name in set(os.listdir(partial)) & _OUR_FILES - {_PARTIAL_MARK}:
        (partial / name).unlink()
    if not keep_mark:
        (partial / _PARTIAL_MARK).unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _train_on(source: Source, vocab_size: int, valid_fraction: float, seed: int) -> Tokenizer:
    """A tokenizer trained on the training split, or on a sample of it that the seed and the names decide."""
    share = min(1.0, _TOKENIZER_BYTES / max(1, source.num_bytes))
    lines: list[str] = []
    taken = 0
    with _progress("reading text for the tokenizer", source.num_bytes) as advance:
        for document, num_bytes in source.documents():
            # Of a source of unknown size it is the beginning.
            if source.num_bytes == 0 and taken >= _TOKENIZER_BYTES:
                break
            if not is_valid_document(document.name, seed, valid_fraction):
                for start in range(0, len(document.text), _TOKENIZER_CHUNK):
                    if _unit_hash("tokenizer", seed, document.name, start) < share:
                        chunk = document.text[start : start + _TOKENIZER_CHUNK]
                        taken += len(chunk)
                        lines.extend(chunk.split(NEWLINE))
            advance(num_bytes)
    _say(f"training a tokenizer of {vocab_size} pieces on {sum(map(len, lines)) / 1e6:.1f} M characters")
    model = train_tokenizer((line for line in lines if line), vocab_size, where="the training split")
    return Tokenizer(model)


class _SplitWriter:
    """One split: Megatron-core's builder, and the counts for the manifest."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        dtype = token_dtype(tokenizer.vocab_size)
        self._paths = {kind: folder / f"{split}.{kind}" for kind in ("bin", "idx")}
        self._builder = megatron_indexed_dataset().IndexedDatasetBuilder(str(self._paths["bin"]), dtype=dtype)
        self._end = tokenizer.end_of_document
        self.documents = self.tokens = self.text_bytes = 0
        self.max_id = self._end

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Add one document: int32 [T] without its end, which is added here."""
        self._builder.add_document(np.append(ids, self._end), [len(ids) + 1])
        self.documents += 1
        self.tokens += len(ids) + 1
        self.text_bytes += text_bytes
        self.max_id = max(self.max_id, int(ids.max(initial=0)))

    def close(self) -> dict[str, Any]:
        """Write the index and return the split's part of the manifest."""
        self._builder.finalize(str(self._paths["idx"]))
        entry: dict[str, Any] = {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "max_id": self.max_id,
        }
        for kind, path in self._paths.items():
            entry[f"{kind}_bytes"] = path.stat().st_size
            entry[f"{kind}_sha256"] = file_sha256(path)
        return entry


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_splits(
    source: Source, folder: Path, tokenizer: Tokenizer, valid_fraction: float, seed: int
) -> tuple[dict[str, Any], int]:
    """Encode all documents; return the manifest's `splits` and the number of documents without text."""
    writers = {split: _SplitWriter(folder, split, tokenizer) for split in SPLITS}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    empty = 0
    with _progress("writing tokens", source.num_bytes) as advance:
        for batch in _batches(source):
            texts = [document.text for document, _ in batch]
            encoded = tokenizer.encode_batch(texts, threads)
            decoded = tokenizer.decode_batch(encoded)
            for (document, num_bytes), ids, read_back in zip(batch, encoded, decoded, strict=True):
                if read_back != document.text:
                    raise UserError(
                        f"the tokenizer changes the text of {document.name}; use one that is lossless, "
                        "such as one trained here"
                    )
                if document.text:
                    valid = is_valid_document(document.name, seed, valid_fraction)
                    writers["valid" if valid else "train"].add(ids, len(document.text.encode()))
                else:
                    empty += 1
                advance(num_bytes)
    for split, writer in writers.items():
        if writer.documents == 0:
            raise UserError(
                f"no document fell into the {split} split (documents: "
                f"{sum(w.documents for w in writers.values())}, validation fraction: {valid_fraction}); "
                "a .txt file is one document: give more documents, or change the fraction or the seed"
            )
    return {split: writer.close() for split, writer in writers.items()}, empty


def _tell_of_rejections(source: Source) -> None:
    rejections = source.rejections
    for reason in rejections.reasons:
        _say(f"left out: {reason}")
    if rejections.count > len(rejections.reasons):
        _say(f"left out: {rejections.count - len(rejections.reasons)} more rows")


def _batches(source: Source) -> Iterator[list[tuple[Document, int]]]:
    batch: list[tuple[Document, int]] = []
    characters = 0
    for document, num_bytes in source.documents():
        batch.append((document, num_bytes))
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done, of `total`, with MB/s on stderr: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        with _progress_bar(title, total) as advance_bar:
            yield advance_bar
        return
    start = said = time.monotonic()
    done = 0

    def line() -> str:
        speed = done / 1e6 / max(time.monotonic() - start, 1e-9)
        share = f"{100 * done / total:.0f} %, " if total else ""
        return f"{title}: {share}{done / 1e6:.1f} MB, {speed:.1f} MB/s"

    def advance(num_bytes: int) -> None:
        nonlocal done, said
        done += num_bytes
        if time.monotonic() - said >= _PLAIN_LINE_SECONDS:
            said = time.monotonic()
            _say(line())

    yield advance
    _say(line())


@contextmanager
def _progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda num_bytes: bar.advance(task, num_bytes)
