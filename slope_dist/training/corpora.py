"""The corpora of a run: opened on every rank, and read through by one of them where that is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slope_dist.config import Config
from slope_dist.data.blend import shares
from slope_dist.data.corpus import Corpus, Summary, token_file
from slope_dist.data.jobs import SPLITS
from slope_dist.data.prepare import prepare_if_absent
from slope_dist.data.sampling import Part, windows_of
from slope_dist.errors import UserError
from slope_dist.files import read_bounded
from slope_dist.parallel import collectives

SEEN = "corpora.json"
"""In the run folder: the files of the corpora, as they were when they were last read through."""

_MAX_SEEN_BYTES = 2**24


class Corpora:
    """One corpus or a mixture of several. Collective: every rank makes one.

    A corpus is read through, by the first rank, unless its files have the size and the time of last write that the
    run's folder has of them: to compare its hashes, or where it has none to compare with, to take them.

    Args:
        config: the run.
        run_folder: of the run; only read.

    Attributes:
        train, valid: a split of each corpus, with its weight, in order of name.
        notes: settings of the config that do not apply to a corpus that is already there.
        tokenizer_sha256: of the tokenizer that all have; None where none has one.
    """

    def __init__(self, config: Config, run_folder: Path) -> None:
        self._seen_path = run_folder / SEEN
        self._first = collectives.rank() == 0
        self._seen: dict[str, Any] = {}
        summaries = {}
        with collectives.together():
            if self._first:
                prepare_if_absent(config)
                self._seen = _read_seen(self._seen_path)
                self._open(config, _summaries(config, self._seen))
                summaries = {key: asdict(corpus.summary) for key, corpus in self._each()}
        # The others need not read through what the first has.
        summaries = collectives.broadcast_json(summaries)
        with collectives.together():
            if not self._first:
                self._open(config, {key: Summary(**summary) for key, summary in summaries.items()})
            self.tokenizer_sha256 = self._common_tokenizer()
            for part in (*self.train, *self.valid):
                # A split too short for one sample would otherwise end the run at its first evaluation.
                windows_of(part.corpus, config.model.sequence_length)
        self.notes = self.train[0].corpus.differs_from(config) if config.data.folder else []

    @property
    def fingerprint(self) -> Any:
        """What names the data: that of the only corpus; of a mixture, those of all and their shares, by name."""
        if len(self.train) == 1:
            return self.train[0].corpus.fingerprint
        parts = shares([part.weight for part in self.train])
        return {
            part.name: {"fingerprint": part.corpus.fingerprint, "share": str(share)}
            for part, share in zip(self.train, parts, strict=True)
        }

    def verify(self) -> None:
        """Compare the corpora with their manifests, but those that this run has compared before.

        Raises:
            UserError: on every rank, if a file was altered.
        """
        with collectives.together():
            if self._first:
                for key, corpus in self._each():
                    if corpus.has_manifest and self._seen.get(key) != _entry(corpus):
                        corpus.verify()

    def remember(self) -> None:
        """Write into the run's folder which files were read through."""
        with collectives.together():
            if self._first:
                now = {key: _entry(corpus) for key, corpus in self._each()}
                if now != self._seen:
                    partial = self._seen_path.with_name(f".{SEEN}.partial")
                    try:
                        partial.write_text(json.dumps(now, indent=2) + "\n")
                        os.replace(partial, self._seen_path)
                    except OSError as error:
                        raise UserError(f"{self._seen_path} cannot be written: {error.strerror or error}") from error

    def _open(self, config: Config, summaries: dict[str, Summary]) -> None:
        data = config.data
        self.train: list[Part] = []
        self.valid: list[Part] = []
        for name, folder, weight in data.corpora:
            for split, parts in (("train", self.train), ("valid", self.valid)):
                corpus = Corpus.open(
                    folder,
                    split,
                    config.model.vocab_size,
                    valid_fraction=data.valid_fraction,
                    tokenizer=data.tokenizer,
                    summary=summaries.get(_key(folder, split)),
                )
                # The order of the only corpus follows from the seed alone, wherever it lies.
                parts.append(Part(corpus, weight, name if data.mixture else ""))

    def _each(self) -> Iterator[tuple[str, Corpus]]:
        for part in (*self.train, *self.valid):
            yield _key(part.corpus.folder, part.corpus.split), part.corpus

    def _common_tokenizer(self) -> str | None:
        """SHA-256 of the tokenizer.

        Raises:
            UserError: two corpora have different ones, so that an id would mean two things.
        """
        having = [part.corpus for part in self.train if part.corpus.tokenizer_sha256 is not None]
        for corpus in having:
            if corpus.tokenizer_sha256 != having[0].tokenizer_sha256:
                raise UserError(
                    f"{corpus.folder} and {having[0].folder} were made with different tokenizers (SHA-256 "
                    f"{corpus.tokenizer_sha256:.12} and {having[0].tokenizer_sha256:.12}), so their ids do not mean "
                    "the same; prepare one again with the other's tokenizer"
                )
        return having[0].tokenizer_sha256 if having else None


def _key(folder: Path | str, split: str) -> str:
    return f"{split} of {os.path.realpath(folder)}"


def _entry(corpus: Corpus) -> dict[str, Any]:
    """What is written down of a corpus that was read through."""
    return {"files": _files(corpus.path), "summary": asdict(corpus.summary)}


def _files(path: Path) -> list[list[int]]:
    """Size and time of last write of a .bin file and its index."""
    found = [file.stat() for file in (path, path.with_suffix(".idx"))]
    return [[file.st_size, file.st_mtime_ns] for file in found]


def _read_seen(path: Path) -> dict[str, Any]:
    """What an earlier part of the run wrote down; nothing where it cannot be read, which costs a reading only."""
    with suppress(OSError, ValueError, RecursionError):
        seen = json.loads(read_bounded(path, _MAX_SEEN_BYTES))
        if isinstance(seen, dict):
            return seen
    return {}


def _summaries(config: Config, seen: dict[str, Any]) -> dict[str, Summary]:
    """What was read of the corpora whose files have not been written to since."""
    found = {}
    for part in config.data.corpora:
        for split in SPLITS:
            key = _key(part.folder, split)
            # Anything else than what `remember` wrote is no error, only of no use.
            with suppress(OSError, KeyError, TypeError, UserError):
                summary = Summary(**seen[key]["summary"])
                same = seen[key]["files"] == _files(token_file(Path(part.folder), split))
                if same and type(summary.max_id) is int and type(summary.fingerprint) is str:
                    found[key] = summary
    return found
