"""Where documents come from: files, what `datasets` loads, or the source code of the running Python's library."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from slope_dist.data.readers import ENDINGS, Document, Item, Lines, of_text, read_file, text_bytes
from slope_dist.errors import UnfinishedError, UserError

_ENDINGS_TEXT = ", ".join(ENDINGS)

_NO_SOURCE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written when Python was built or installed: they hold paths of the machine, and differ between two builds.
_GENERATED = ("_sysconfigdata", "sitecustomize")


MOST_REASONS = 10
"""Rejected rows that are told of one by one."""


class Rejections:
    """Rows of the last pass that hold no document.

    Attributes:
        count: how many.
        reasons: of the first ones, a line each.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin a new pass."""
        self.count = 0
        self.reasons: list[str] = []

    def add(self, reason: str) -> None:
        """Count one more."""
        self.extend(1, [reason])

    def extend(self, count: int, reasons: Sequence[str]) -> None:
        """Count `count` more, with the reasons of the first ones."""
        self.count += count
        self.reasons.extend(reasons[: MOST_REASONS - len(self.reasons)])


class ChangedInputError(UserError):
    """A file is not what it was in an earlier pass."""


class Inputs:
    """The files of the last pass, hashed before they are read.

    Attributes:
        files: name, bytes and sha256 of each that was begun.
        expected: what an earlier pass found, which this one must find too; None: anything.
    """

    def __init__(self) -> None:
        self.files: list[dict[str, Any]] = []
        self.expected: list[dict[str, Any]] | None = None

    def read(self, name: str, path: Path, field: str) -> Iterator[Item]:
        """The rows of a file.

        Raises:
            ChangedInputError: it is not what an earlier pass found.
            UnfinishedError: it cannot be read, or is written to meanwhile.
            UserError: as for `read_file`.
        """
        before = _state_of(path)
        try:
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UnfinishedError(f"cannot read {path}: {error.strerror or error}") from error
        found = {"name": name, "bytes": before[0], "sha256": sha256}
        number = len(self.files)
        if self.expected is not None and self.expected[number : number + 1] != [found]:
            raise ChangedInputError(_changed(path))
        self.files.append(found)
        yield from read_file(name, path, field)
        if _state_of(path) != before:
            # Perhaps to no effect: who goes on compares what is in it.
            raise UnfinishedError(_changed(path))


def _state_of(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UnfinishedError(f"cannot read {path}: {error.strerror or error}") from error
    return found.st_size, found.st_mtime_ns


def _changed(path: Path) -> str:
    return f"{path} changed since it was first read; let nothing write to it, and prepare again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents in a fixed order, readable more than once.

    Attributes:
        description: what the source is, for the corpus's manifest; holds no path of the machine.
        num_bytes: bytes on disk, or of text, for progress; 0 where they are not known.
        documents: starts a new pass; yields (document, bytes on disk read for it).
        unparsed: as `documents`, but bad rows come too, and rows of .jsonl as they lie in the file; None: there are
            documents only.
        skip_bad_rows: whether bad rows are left out and counted, which are otherwise refused.
        rejections: what of the pass was left out.
        inputs: the files of the pass.
        text_bytes: about how many bytes of text there are, for sampling; None: `num_bytes`.
    """

    description: dict[str, Any]
    num_bytes: int
    documents: Callable[[], Iterator[tuple[Document, int]]]
    unparsed: Callable[[], Iterator[Item]] | None = None
    skip_bad_rows: bool = False
    rejections: Rejections = field(default_factory=Rejections)
    inputs: Inputs = field(default_factory=Inputs)
    text_bytes: Callable[[], int] | None = None

    def items(self) -> Iterator[Item]:
        """Start a new pass over `unparsed`; its bad rows are counted by who parses it."""
        self.rejections.clear()
        self.inputs.files = []
        return self.documents() if self.unparsed is None else self.unparsed()


def python_stdlib() -> Source:
    """The .py files of the running Python's standard library, by relative path; tests and packages left out.

    Files that are not UTF-8 are left out and counted in the description.

    Raises:
        UserError: this Python has no readable standard library source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[tuple[str, Path, int]] = []
    skipped = 0
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _NO_SOURCE_FOLDERS and not name.startswith("config-")
        ]
        for name in names:
            if not name.endswith(".py") or name.startswith(_GENERATED):
                continue
            path = Path(folder, name)
            try:
                size = len(path.read_bytes().decode().encode())
            except (OSError, UnicodeDecodeError):
                skipped += 1
                continue
            files.append((path.relative_to(root).as_posix(), path, size))
    if not files:
        raise UserError(
            f"this Python has no readable standard library source in {root}; install it, or prepare other text "
            "with tools/prepare_data.py"
        )
    files.sort()

    def documents() -> Iterator[tuple[Document, int]]:
        for name, path, size in files:
            yield Document(name=name, text=path.read_bytes().decode()), size

    description = {
        "kind": "python-stdlib",
        "python": platform.python_version(),
        "files": len(files),
        "files_not_readable": skipped,
    }
    return Source(description=description, num_bytes=sum(size for *_, size in files), documents=documents)


EMBEDDED: dict[str, Callable[[], Source]] = {"python-stdlib": python_stdlib}


def embedded_source(name: str) -> Source:
    """The source of that name, made of what the machine has; nothing is downloaded.

    Raises:
        UserError: no such source.
    """
    if name not in EMBEDDED:
        raise UserError(f'no embedded source "{name}"; there is: {", ".join(sorted(EMBEDDED))}')
    return EMBEDDED[name]()


def text_files(inputs: Sequence[str], text_field: str = "text", *, skip_bad_rows: bool = False) -> Source:
    """Documents of files in the formats of readers.py.

    An input is a file, a folder (searched for known endings, in order of name; links to folders are entered), or a glob
    pattern, in which ** goes into folders. A file that several inputs name is read once.

    Args:
        inputs: at least one.
        text_field: that holds the text in formats with fields.
        skip_bad_rows: leave out and count rows that hold no text, which are otherwise refused.

    Raises:
        UserError: an input is missing, matches nothing or has another ending; while reading: a file that is damaged,
            or a bad row, by file and line.
    """
    by_path: dict[Path, tuple[str, Path]] = {}
    for given in inputs:
        for name, path in _find(given):
            by_path.setdefault(path.resolve(), (name, path))
    found = list(by_path.values())
    if not found:
        raise UserError(f"no input: name files ({_ENDINGS_TEXT}), folders of them, or patterns")

    log = Inputs()

    def items() -> Iterator[Item]:
        for name, path in found:
            yield from log.read(name, path, text_field)

    return _checked(
        items,
        {"kind": "files", "files": [name for name, _ in found], "field": text_field},
        sum(path.stat().st_size for _, path in found),
        skip_bad_rows,
        log,
        lambda: sum(text_bytes(path, text_field) for _, path in found),
    )


def dataset(
    name: str, split: str, text_field: str = "text", *, stream: bool = False, skip_bad_rows: bool = False
) -> Source:
    """Documents of what Hugging Face `datasets` loads: a name on its hub ("name" or "name:config"), or a folder.

    Args:
        name: of the dataset; a folder that its `save_to_disk` made, or one of files that it knows.
        split: which of its splits.
        text_field: column that holds the text.
        stream: read it as it comes, without storing it first.
        skip_bad_rows: leave out and count rows that hold no text, which are otherwise refused.

    Raises:
        UserError: it cannot be loaded, or has no such split or column; while reading: a bad row, by its number.
    """
    loaded = _load_dataset(name, split, stream)
    columns = loaded.column_names
    if columns is not None and text_field not in columns:
        raise UserError(
            f'dataset {name} has no column "{text_field}"; it has {", ".join(columns[:8])}: name one with --field'
        )
    if columns is not None:
        # Pictures and sounds beside the text would be decoded with it.
        loaded = loaded.select_columns([text_field])
    size = 0 if stream else int(loaded.data.nbytes * len(loaded) / max(1, loaded.data.num_rows))

    def items() -> Iterator[Item]:
        rows = iter(loaded)
        for number in count(1):
            where = f"dataset {name}, {split}: row {number}"
            try:
                row = next(rows, None)
            except Exception as error:
                # Whatever can go wrong with files and networks, and formats that are read as they come.
                raise UnfinishedError(f"cannot read {where}: {_first_line(error)}") from error
            if row is None:
                return
            text = row.get(text_field)
            yield of_text(text, text_field, f"{split}:{number}", where), len(text) if isinstance(text, str) else 0

    # A folder's path is the machine's.
    known = Path(name).name if os.path.isdir(name) else name
    description = {"kind": "dataset", "name": known, "split": split, "field": text_field}
    return _checked(items, description, size, skip_bad_rows, Inputs())


def _load_dataset(name: str, split: str, stream: bool) -> Any:
    import datasets

    datasets.disable_progress_bars()
    is_folder = os.path.isdir(name)
    path, _, config = (name, "", "") if is_folder else name.partition(":")
    try:
        if is_folder and any(os.path.exists(Path(name) / mark) for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise UserError(f'dataset {name} has no split "{split}"; it has {", ".join(loaded)}')
                loaded = loaded[split]
            elif split != str(loaded.split or "train"):
                raise UserError(f'dataset {name} has no split "{split}"; it has {loaded.split or "train"}')
            return loaded.to_iterable_dataset() if stream else loaded
        return datasets.load_dataset(path, config or None, split=split, streaming=stream)
    except UserError:
        raise
    except Exception as error:
        # Whatever can go wrong with files, networks and builders.
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"cannot load dataset {name}, split {split}: {reason}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _checked(
    items: Callable[[], Iterator[Item]],
    description: dict[str, Any],
    num_bytes: int,
    skip_bad_rows: bool,
    inputs: Inputs,
    text_bytes: Callable[[], int] | None = None,
) -> Source:
    """The source of these items: its bad rows refused, or left out and counted."""
    rejections = Rejections()

    def documents() -> Iterator[tuple[Document, int]]:
        rejections.clear()
        inputs.files = []
        for item, read in items():
            for row in item.rows() if isinstance(item, Lines) else (item,):
                if isinstance(row, Document):
                    yield row, read
                    read = 0
                elif skip_bad_rows:
                    rejections.add(row.reason)
                else:
                    raise UserError(row.reason)

    return Source(
        description=description,
        num_bytes=num_bytes,
        documents=documents,
        unparsed=items,
        skip_bad_rows=skip_bad_rows,
        rejections=rejections,
        inputs=inputs,
        text_bytes=text_bytes,
    )


def _find(given: str) -> Iterator[tuple[str, Path]]:
    try:
        yield from _found(given)
    except OSError as error:
        raise UserError(f"input {given:.100} cannot be looked for: {error.strerror or error}") from error


def _files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder, those behind links to folders too; a folder that several ways lead to is entered once."""
    tops, entered = [folder], set()
    while tops:
        # Links come after all that is there without them, which so keeps its names.
        links: list[Path] = []
        for top in tops:
            for where, subfolders, names in os.walk(top):
                real = os.path.realpath(where)
                if real in entered:
                    subfolders.clear()
                    continue
                entered.add(real)
                subfolders.sort()
                links += [link for link in (Path(where, name) for name in subfolders) if link.is_symlink()]
                yield from (Path(where, name) for name in names)
        tops = links


def _found(given: str) -> Iterator[tuple[str, Path]]:
    path = Path(given)
    if path.is_dir():
        found = sorted(
            (inside.relative_to(path).as_posix(), inside)
            for inside in _files_below(path)
            if inside.name.endswith(ENDINGS) and inside.is_file()
        )
        if not found:
            raise UserError(f"folder {given} holds no file of {_ENDINGS_TEXT}; name a folder that does")
        yield from found
        return
    if path.is_file():
        matches = [given]
    elif glob.has_magic(given):
        matches = sorted(match for match in glob.glob(given, recursive=True) if os.path.isfile(match))
        if not matches:
            raise UserError(f"pattern {given} matches no file")
    else:
        raise UserError(f"input {given} does not exist or is no file or folder; check the path")
    for match in matches:
        if not match.endswith(ENDINGS):
            raise UserError(f"input {match} is none of {_ENDINGS_TEXT}; rename or convert it")
        yield Path(match).name, Path(match)
