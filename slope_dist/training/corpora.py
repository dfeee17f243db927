"""The corpora of a run: opened on every rank, and read through by one of them where that is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slope_dist.config import Config
from slope_dist.config.weights import shares
from slope_dist.data.corpus import Corpus, Summary, stamps_of, token_file
from slope_dist.data.jobs import SPLITS
from slope_dist.data.prepare import MANIFEST, prepare_if_absent
from slope_dist.data.sampling import Part, windows_of
from slope_dist.errors import UserError
from slope_dist.files import read_bounded
from slope_dist.output import tell
from slope_dist.parallel import collectives
from slope_dist.transfer import Transfer

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
        end_of_document: its id that ends a document.
    """

    def __init__(self, config: Config, run_folder: Path) -> None:
        self._seen_path = run_folder / SEEN
        self._say = tell if collectives.rank() == 0 else None
        self._seen: dict[str, Any] = {}

        def read_through(alive: Callable[[], None]) -> dict[str, Any]:
            prepare_if_absent(config)
            self._seen = _read_seen(self._seen_path)
            known = _summaries(config, self._seen)
            size = _bytes_to_read(config, known)
            self._open(config, known, self._passed(alive, "reading corpora without manifest", size))
            return {key: asdict(corpus.summary) for key, _, corpus in self._each()}

        # The others need not read through what the first has.
        summaries = collectives.broadcast_json(collectives.alone(read_through))
        with collectives.together():
            if collectives.rank() > 0:
                self._open(config, {key: Summary(**summary) for key, summary in summaries.items()}, lambda count: None)
            self.tokenizer_sha256, self.end_of_document = self._common_tokenizer()
            for part in (*self.train, *self.valid):
                # A split too short for one sample would otherwise end the run at its first evaluation.
                windows_of(part.corpus, config.model.sequence_length)
        self.notes = self._notes(config)

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

        def compare(alive: Callable[[], None]) -> None:
            for _, place, corpus in self._each():
                if corpus.has_manifest and self._seen.get(place) != _entry(corpus):
                    size = sum(file_size for file_size, *_ in corpus.stamps)
                    corpus.verify(self._passed(alive, f"verifying {corpus.path}", size))

        collectives.alone(compare)

    def remember(self) -> None:
        """Write into the run's folder which files were read through."""
        with collectives.together():
            if collectives.rank() == 0:
                now = {place: _entry(corpus) for _, place, corpus in self._each()}
                if now != self._seen:
                    partial = self._seen_path.with_name(f".{SEEN}.partial")
                    try:
                        partial.write_text(json.dumps(now, indent=2) + "\n")
                        os.replace(partial, self._seen_path)
                    except OSError as error:
                        raise UserError(f"{self._seen_path} cannot be written: {error.strerror or error}") from error

    def _open(self, config: Config, summaries: dict[str, Summary], passed: Callable[[int], None]) -> None:
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
                    summary=summaries.get(f"{split} of {name}"),
                    passed=passed,
                )
                # The order of the only corpus follows from the seed alone, whatever it is called.
                parts.append(Part(corpus, weight, name if len(data.corpora) > 1 else ""))
        self._names = [part.name for part in data.corpora]

    def _each(self) -> Iterator[tuple[str, str, Corpus]]:
        """Each split by its name in this config, which all ranks share, and by its place on this machine."""
        for split, parts in (("train", self.train), ("valid", self.valid)):
            for name, part in zip(self._names, parts, strict=True):
                yield f"{split} of {name}", _place(part.corpus.folder, split), part.corpus

    def _passed(self, alive: Callable[[], None], what: str, size: int) -> Callable[[int], None]:
        transfer = Transfer(what, self._say)
        transfer.begin(size)

        def passed(count: int) -> None:
            transfer.add(count)
            alive()

        return passed

    def _notes(self, config: Config) -> list[str]:
        if config.data.folder is not None:
            return self.train[0].corpus.differs_from(config)
        # Of a mixture each corpus was made in its own way: only what the config asks for is worth a word.
        asked = tuple(f"data.{key} " for key in config.data.model_fields_set)
        lines = [line for part in self.train for line in part.corpus.differs_from(config)]
        return [line for line in lines if line.startswith(asked)]

    def _common_tokenizer(self) -> tuple[str | None, int | None]:
        """SHA-256 of the tokenizer, and its id that ends a document.

        Raises:
            UserError: two corpora have different ones, so that an id would mean two things.
        """
        having = [part.corpus for part in self.train if part.corpus.tokenizer_sha256 is not None]
        for corpus in having:
            one, other = ((of.tokenizer_sha256, of.end_of_document) for of in (corpus, having[0]))
            if one != other:
                raise UserError(
                    f"{corpus.folder} and {having[0].folder} were made with different tokenizers (SHA-256 {one[0]:.12} "
                    f"and {other[0]:.12}, end of document {one[1]} and {other[1]}), so their ids do not mean the same; "
                    "prepare one again with the other's tokenizer"
                )
        return (having[0].tokenizer_sha256, having[0].end_of_document) if having else (None, None)


def _place(folder: Path | str, split: str) -> str:
    return f"{split} of {os.path.realpath(folder)}"


def _entry(corpus: Corpus) -> dict[str, Any]:
    """What is written down of a corpus that was read through: its files as they were before."""
    return {"files": corpus.stamps, "summary": asdict(corpus.summary)}


def _read_seen(path: Path) -> dict[str, Any]:
    """What an earlier part of the run wrote down; nothing where it cannot be read, which costs a reading only."""
    with suppress(OSError, ValueError, RecursionError):
        seen = json.loads(read_bounded(path, _MAX_SEEN_BYTES))
        if isinstance(seen, dict):
            return seen
    return {}


def _bytes_to_read(config: Config, known: dict[str, Summary]) -> int:
    """Of corpora that have no manifest, and were not read before."""
    files = {}
    for part in config.data.corpora:
        for split in SPLITS:
            # What cannot be found or read is told of when it is opened.
            with suppress(OSError, UserError):
                if f"{split} of {part.name}" not in known and not (Path(part.folder) / MANIFEST).exists():
                    file = token_file(Path(part.folder), split)
                    files[file] = file.stat().st_size
    return sum(files.values())


def _summaries(config: Config, seen: dict[str, Any]) -> dict[str, Summary]:
    """What was read of the corpora whose files have not been written to since."""
    found = {}
    for part in config.data.corpora:
        for split in SPLITS:
            # Anything else than what `remember` wrote is no error, only of no use.
            with suppress(OSError, KeyError, TypeError, UserError):
                entry = seen[_place(part.folder, split)]
                summary = Summary(**entry["summary"])
                same = entry["files"] == stamps_of(token_file(Path(part.folder), split))
                if same and type(summary.max_id) is int and type(summary.fingerprint) is str:
                    found[f"{split} of {part.name}"] = summary
    return found
