"""Text to a corpus on disk: a folder that appears whole or not at all.

A corpus folder holds `train.bin` and `train.idx`, `valid.bin` and `valid.idx` (Megatron-core's indexed dataset: one
sequence a document, ended by the end-of-document id), the tokenizer (`tokenizer.model`, or `tokenizer.json` with
`tokenizer_config.json`), and `manifest.json`, which has the counts, sizes and SHA-256 of the others and of the files
that the text was read from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slope_dist import __version__
from slope_dist.data import json_tokenizer
from slope_dist.data.jobs import SPLITS, Encode, Job, Result, RowOptions, Sample, token_dtype
from slope_dist.data.journal import (
    JOURNAL,
    LENGTHS,
    DamagedJournalError,
    TokenFiles,
    begin_journal,
    read_journal,
)
from slope_dist.data.load_tokenizer import FILES, load_tokenizer
from slope_dist.data.progress import progress, say
from slope_dist.data.readers import Document, Lines, Row
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.data.sources import ChangedInputError, Source, embedded_source
from slope_dist.data.staging import fsync, holds_something, kept, remove, staged
from slope_dist.data.tokenizer import NEWLINE, Tokenizer
from slope_dist.data.workers import in_order
from slope_dist.errors import UnfinishedError, UserError

if TYPE_CHECKING:
    from slope_dist.config.schema import Config

FORMAT = 1
MANIFEST = "manifest.json"

_TEMPORARY = {JOURNAL, *LENGTHS}
_OUR_FILES = {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")} | _TEMPORARY
_OUR_FILES |= {*FILES, json_tokenizer.CONFIG_FILE, MANIFEST}
_TOKENIZER_BYTES = 32 << 20
_BATCH_BYTES = 1 << 20
# Less is done before another process has started.
_BYTES_A_WORKER = 8 << 20


def megatron_indexed_dataset() -> ModuleType:
    """Megatron-core's indexed dataset module, imported at first use: the import takes seconds."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What decides the bytes of a corpus, beside its text and its tokenizer."""

    vocab_size: int | None
    valid_fraction: float
    seed: int


def prepare(
    source: Source,
    folder: Path | str,
    *,
    vocab_size: int | None,
    valid_fraction: float,
    seed: int,
    tokenizer: Path | str | None = None,
    end_of_document: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the corpus of `source` into `folder`, which must not exist or be empty, and return its manifest.

    Args:
        source: the documents. Documents without text are left out and counted.
        folder: final place; until all is written, a sibling named `<folder>.partial` is used.
        vocab_size: ids of the tokenizer trained on the training split, or the most that a given one may have
            (None: any number).
        valid_fraction: share of the documents for validation, above 0 and below 1.
        seed: decides the split and what the tokenizer is trained on.
        tokenizer: what `load_tokenizer` takes, to use instead of training one.
        end_of_document: token of a given tokenizer that ends a document, where it cannot be told.
        workers: processes that read rows and encode them; None: as many as there are cores, fewer for little text.

    Raises:
        UserError: bad input, a folder that holds something, a split without documents, text that changes while it is
            read; a disk that is full, a worker that dies.

    The same source, arguments and library versions give the same bytes, with any number of workers. Nothing is at
    `folder` before all is. Where a kill, Ctrl-C, a full disk or a lost worker ends this while tokens are written, the
    same call goes on where it was: the text that was done is read again and compared by its hash, not encoded again.
    """
    if not 0.0 < valid_fraction < 1.0:
        raise UserError(f"validation fraction {valid_fraction} is out of range; use one above 0 and below 1")
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers are less than 1")
    folder = Path(folder)
    given = load_tokenizer(tokenizer, end_of_document) if tokenizer is not None else None
    if given is None and vocab_size is None:
        raise ValueError("neither a tokenizer nor the size of one to train")
    if given is not None and vocab_size is not None and given.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer} has {given.vocab_size} ids, more than the vocabulary of {vocab_size}; "
            "use a larger vocabulary or a smaller tokenizer"
        )
    options = _Options(vocab_size=vocab_size, valid_fraction=valid_fraction, seed=seed)
    workers = workers or _cores_for(source)
    try:
        with staged(folder, _OUR_FILES, _TEMPORARY) as partial:
            manifest = _write(source, partial, given, options, workers)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write corpus {folder}: {_reason(error)}{_how_to_go_on(folder)}") from error
    except UnfinishedError as error:
        raise UserError(f"{error}{_how_to_go_on(folder)}") from error
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
        if holds_something(folder) or Path(f"{folder}.idx").exists():
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


def _reason(error: OSError) -> str:
    what = error.strerror or str(error)
    return what if error.filename is None else f"{what} ({error.filename})"


def _how_to_go_on(folder: Path) -> str:
    return "; the same command goes on where this one was" if kept(folder) else ""


def _cores_for(source: Source) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 1 + source.num_bytes // _BYTES_A_WORKER) if source.num_bytes else cores


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a batch ends: the bytes on disk that were read for it, and a hash of all rows up to its end."""

    num_bytes: int
    digest: str


_Batches = Iterator[tuple[list[Row], _Mark]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    """What is written, with what, and the rows that are left."""

    tokenizer: Tokenizer
    files: TokenFiles
    batches: _Batches
    num_bytes: int


def _write(source: Source, partial: Path, given: Tokenizer | None, options: _Options, workers: int) -> dict[str, Any]:
    """Write all but the manifest, from the beginning or from where an earlier attempt was; return the manifest."""
    key = _key(source, given, options)
    attempt = _gone_on_with(source, partial, key) or _begun(source, partial, key, given, options, workers)
    used, files = attempt.tokenizer, attempt.files
    try:
        _encode(source, attempt, Encode(used, partial, _rows(source, options)), workers)
        _check_splits(files.state["splits"], options.valid_fraction)
        splits = files.finish()
    finally:
        files.close()
    return {
        "format": FORMAT,
        "vocab_size": used.vocab_size,
        "end_of_document": used.end_of_document,
        "dtype": token_dtype(used.vocab_size).__name__,
        "tokenizer": next(iter(used.files())),
        "tokenizer_sha256": used.sha256,
        "source": source.description,
        "inputs": source.inputs.files,
        "documents_without_text": files.state["without_text"],
        "rows_rejected": source.rejections.count,
        "valid_fraction": options.valid_fraction,
        "seed": options.seed,
        "splits": splits,
    }


def _rows(source: Source, options: _Options) -> RowOptions:
    return RowOptions(seed=options.seed, valid_fraction=options.valid_fraction, skip_bad_rows=source.skip_bad_rows)


def _key(source: Source, given: Tokenizer | None, options: _Options) -> dict[str, Any]:
    """What an attempt must agree in with an earlier one to go on with it, by what to call it."""
    return {
        "versions": [__version__, version("sentencepiece"), version("tokenizers")],
        "text": [source.description, source.num_bytes],
        "tokenizer": [given.sha256, given.end_of_document] if given else options.vocab_size,
        "options": asdict(_rows(source, options)),
    }


def _begun(
    source: Source,
    partial: Path,
    key: dict[str, Any],
    given: Tokenizer | None,
    options: _Options,
    workers: int,
) -> _Attempt:
    """A new attempt, with a tokenizer that is on the disk."""
    source.inputs.expected = None
    used = given or _train_on(source, options, workers)
    for name, content in used.files().items():
        (partial / name).write_bytes(content)
        fsync(partial / name)
    if given is None and source.num_bytes:
        # The tokenizer is that of this text only if the next pass reads the same.
        source.inputs.expected = source.inputs.files
    identity = [used.sha256, used.end_of_document]
    begin_journal(partial, {"key": key, "tokenizer": identity, "inputs": source.inputs.expected})
    files = TokenFiles(partial, used.vocab_size, used.end_of_document)
    files.commit()
    return _Attempt(tokenizer=used, files=files, batches=_batches(source), num_bytes=source.num_bytes)


def _gone_on_with(source: Source, partial: Path, key: dict[str, Any]) -> _Attempt | None:
    """The earlier attempt that was left, behind what it has written; None if there is none of this text.

    One of other text or options is removed, and that is told.
    """
    found = read_journal(partial)
    if found is None:
        if (partial / JOURNAL).exists():
            say(f"not going on with {partial}: its journal cannot be read; starting over")
        remove(partial, _OUR_FILES)
        return None
    try:
        return _compared(source, partial, key, *found)
    except (DamagedJournalError, ChangedInputError) as error:
        say(f"not going on with {partial}: {error}; starting over")
    except (KeyError, TypeError, AttributeError, ValueError):
        say(f"not going on with {partial}: its journal is damaged; starting over")
    remove(partial, _OUR_FILES)
    return None


def _compared(
    source: Source, partial: Path, key: dict[str, Any], header: dict[str, Any], state: dict[str, Any]
) -> _Attempt:
    """The earlier attempt, if all that it has done is of the text that is read now."""
    other = [name for name, value in key.items() if header["key"].get(name) != value]
    if other:
        raise DamagedJournalError(f"it was begun with other {' and '.join(other)}")
    try:
        used = load_tokenizer(partial)
    except UserError as error:
        raise DamagedJournalError("its tokenizer is damaged") from error
    if [used.sha256, used.end_of_document] != header["tokenizer"]:
        raise DamagedJournalError("its tokenizer is another")
    source.inputs.expected = header["inputs"]
    batches = _batches(source)
    digest, done = "", 0
    if state["batches"]:
        with progress("comparing the text with what was done", source.num_bytes) as advance:
            for _ in range(state["batches"]):
                _, mark = next(batches, ([], _Mark(0, "none")))
                digest = mark.digest
                done += mark.num_bytes
                advance(mark.num_bytes)
    if digest != state["input"]:
        raise DamagedJournalError("its text was another")
    files = TokenFiles(partial, used.vocab_size, used.end_of_document, state)
    source.rejections.extend(state["rejected"], state["reasons"])
    documents = sum(counts["documents"] for counts in state["splits"].values())
    say(f"going on with {partial}: {documents} documents were done")
    return _Attempt(tokenizer=used, files=files, batches=batches, num_bytes=max(0, source.num_bytes - done))


def _train_on(source: Source, options: _Options, workers: int) -> Tokenizer:
    """A tokenizer trained on the training split, or on a sample of it that the seed and the names decide."""
    assert options.vocab_size is not None
    size = source.num_bytes if source.text_bytes is None else source.text_bytes()
    job = Sample(min(1.0, _TOKENIZER_BYTES / max(1, size)), _rows(source, options))
    # Every `stride`th piece of the sample; more than one where compressed text is more than its files say.
    pieces: list[str] = []
    taken, stride, number = 0, 1, 0
    title = "reading text for the tokenizer"
    for _, result in _results(source, _batches(source), job, workers, title, source.num_bytes):
        for part in result.parts:
            if number % stride == 0:
                pieces.append(part.decode())
                taken += len(pieces[-1])
            number += 1
            # Beyond what chance makes of plain text, whose sample is left as it is.
            while taken > 2 * _TOKENIZER_BYTES and len(pieces) > 1:
                pieces, stride = pieces[::2], 2 * stride
                taken = sum(map(len, pieces))
        # Of a source of unknown size it is the beginning.
        if source.num_bytes == 0 and taken >= _TOKENIZER_BYTES:
            break
    lines = [line for piece in pieces for line in piece.split(NEWLINE)]
    say(f"training a tokenizer of {options.vocab_size} pieces on {sum(map(len, lines)) / 1e6:.1f} M characters")
    model = train_tokenizer((line for line in lines if line), options.vocab_size, where="the training split")
    return SentencePieceTokenizer(model)


def _encode(source: Source, attempt: _Attempt, job: Encode, workers: int) -> None:
    """Write the tokens of all batches that are left."""
    files = attempt.files
    for mark, result in _results(source, attempt.batches, job, workers, "writing tokens", attempt.num_bytes):
        files.state |= {"rejected": source.rejections.count, "reasons": source.rejections.reasons}
        files.add(result, mark.digest)


def _results(
    source: Source, batches: _Batches, job: Job, workers: int, title: str, num_bytes: int
) -> Iterator[tuple[_Mark, Result]]:
    """What the job makes of each batch, in order; its bad rows are counted, or the first one is refused."""
    # Workers end with the loop, not when the last one who holds an error lets go of it.
    with progress(title, num_bytes) as advance, closing(in_order(job, batches, workers)) as results:
        for mark, result in results:
            if result.facts["error"] is not None:
                raise UserError(result.facts["error"])
            source.rejections.extend(result.facts["rejected"], result.facts["reasons"])
            yield mark, result
            advance(mark.num_bytes)


def _batches(source: Source) -> _Batches:
    """All rows, in batches that are the same in every pass over the same text."""
    digest = hashlib.sha256()
    batch: list[Row] = []
    size = read = 0
    for row, num_bytes in source.items():
        if isinstance(row, Lines):
            name, data = f"{row.name}:{row.first}", row.data
        elif isinstance(row, Document):
            name, data = row.name, row.text.encode()
        else:
            name, data = row.reason, b""
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
        batch.append(row)
        size += len(data)
        read += num_bytes
        if size >= _BATCH_BYTES:
            yield batch, _Mark(read, digest.hexdigest())
            batch, size, read = [], 0, 0
    if batch:
        yield batch, _Mark(read, digest.hexdigest())


def _check_splits(splits: dict[str, dict[str, int]], valid_fraction: float) -> None:
    for split, counts in splits.items():
        if counts["documents"] == 0:
            raise UserError(
                f"no document fell into the {split} split (documents: "
                f"{sum(counts['documents'] for counts in splits.values())}, validation fraction: {valid_fraction}); "
                "a .txt file is one document: give more documents, or change the fraction or the seed"
            )


def _tell_of_rejections(source: Source) -> None:
    rejections = source.rejections
    for reason in rejections.reasons:
        say(f"left out: {reason}")
    if rejections.count > len(rejections.reasons):
        say(f"left out: {rejections.count - len(rejections.reasons)} more rows")
