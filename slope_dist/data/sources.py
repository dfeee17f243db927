"""Where documents come from: text files, jsonl files, or the source code of the running Python's standard library."""

from __future__ import annotations

import glob
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_dist.errors import UserError

ENDINGS = (".txt", ".jsonl")

_NO_SOURCE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written when Python was built or installed: they hold paths of the machine, and differ between two builds.
_GENERATED = ("_sysconfigdata", "sitecustomize")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: its text, and a name that decides its split and so holds no path of the machine."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents in a fixed order, readable more than once.

    Attributes:
        description: what the source is, for the corpus's manifest; holds no path of the machine.
        num_bytes: bytes on disk, for progress and sampling.
        documents: starts a new pass; yields (document, bytes on disk read for it).
    """

    description: dict[str, Any]
    num_bytes: int
    documents: Callable[[], Iterator[tuple[Document, int]]]


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
            yield Document(name=name, text=_read_text(path)), size

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


def text_files(inputs: Sequence[str], field: str = "text") -> Source:
    """Documents of .txt files (one each) and .jsonl files (one a line, its text under `field`).

    An input is a file, a folder (searched for both endings, in order of name), or a glob pattern, in which ** goes
    into folders. A file that several inputs name is read once.

    Raises:
        UserError: an input is missing, matches nothing or has another ending; while reading: text that is not UTF-8
            or a bad row, by file and line.
    """
    by_path: dict[Path, tuple[str, Path]] = {}
    for given in inputs:
        for name, path in _find(given):
            by_path.setdefault(path.resolve(), (name, path))
    files = list(by_path.values())
    if not files:
        raise UserError("no input: name .txt or .jsonl files, folders of them, or patterns")
    sizes = [path.stat().st_size for _, path in files]

    def documents() -> Iterator[tuple[Document, int]]:
        for (name, path), size in zip(files, sizes, strict=True):
            if path.suffix == ".jsonl":
                yield from _read_rows(name, path, field)
            else:
                yield Document(name=name, text=_read_text(path)), size

    description = {"kind": "files", "files": [name for name, _ in files], "field": field}
    return Source(description=description, num_bytes=sum(sizes), documents=documents)


def _find(given: str) -> Iterator[tuple[str, Path]]:
    path = Path(given)
    if path.is_dir():
        found = sorted(
            (inside.relative_to(path).as_posix(), inside)
            for inside in path.rglob("*")
            if inside.suffix in ENDINGS and inside.is_file()
        )
        if not found:
            raise UserError(f"folder {given} holds no {' or '.join(ENDINGS)} file; name a folder that does")
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
            raise UserError(f"input {match} is not {' or '.join(ENDINGS)}; rename or convert it")
        yield Path(match).name, Path(match)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: bad byte at offset {error.start}; convert it") from error


def _read_rows(name: str, path: Path, field: str) -> Iterator[tuple[Document, int]]:
    try:
        with path.open("rb") as stream:
            for number, row in enumerate(stream, start=1):
                if row.strip():
                    text = _row_text(row, field, f"{path}:{number}")
                    yield Document(name=f"{name}:{number}", text=text), len(row)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _row_text(row: bytes, field: str, where: str) -> str:
    try:
        value = json.loads(row.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f'{where}: not a JSON object; a row looks like {{"{field}": "..."}}')
    text = value.get(field)
    if not isinstance(text, str):
        problem = "is not a string" if field in value else "is missing"
        raise UserError(f'{where}: field "{field}" {problem}; fix the row or name the field with --field')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair at character {error.start}; fix the row") from error
    return text
