"""Files of text, one format each: what documents are in them, and which rows are none.

.txt                one document, UTF-8
.jsonl              one document a line, its text in a field
.parquet            one document a row, its text in a column
.txt and .jsonl with .gz or .zst behind are read as they are
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slope_dist.errors import UnfinishedError, UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = (*(plain + packed for plain in (".txt", ".jsonl") for packed in ("", *COMPRESSIONS)), ".parquet")

_ROWS_AT_ONCE = 1024
_BYTES_AT_ONCE = 1 << 18
_TEXT_TYPES = ("string", "large_string", "string_view", "null")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: its text, and a name that decides its split and so holds no path of the machine."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that holds no document: where and why, in a line."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """Whole lines of a .jsonl file, not yet parsed: that takes longest, and any process can do it."""

    name: str
    path: str
    field: str
    first: int
    data: bytes

    def rows(self) -> Iterator[Document | Rejected]:
        """What is in each line that is not blank."""
        for number, row in enumerate(self.data.split(b"\n"), start=self.first):
            if row.strip():
                yield _of_json(row, self.field, f"{self.name}:{number}", f"{self.path}:{number}")


Row = Document | Rejected | Lines

Item = tuple[Row, int]
"""A row or many lines, and the bytes on disk that were read for them."""


def read_file(name: str, path: Path, field: str) -> Iterator[Item]:
    """The rows of a file, in order.

    Args:
        name: what documents are called after.
        path: where it is; its ending is one of `ENDINGS`.
        field: that holds the text, where rows have fields.

    Raises:
        UserError: if the file cannot be read, is cut short, or is of another format than its ending says.
    """
    plain = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
    read = _read_parquet if plain.endswith(".parquet") else _read_lines if plain.endswith(".jsonl") else _read_text
    try:
        yield from read(name, path, field)
    except OSError as error:
        # pyarrow says what is wrong with compressed bytes without a number; other failures may heal.
        kind = UserError if error.errno is None else UnfinishedError
        raise kind(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The file's content, decompressed, and how many of its bytes on disk have been read."""
    with path.open("rb") as raw:
        if path.suffix not in COMPRESSIONS:
            yield raw, raw.tell
            return
        import pyarrow

        if not os.fstat(raw.fileno()).st_size:
            # Which pyarrow takes for the compressed form of nothing.
            raise UserError(f"{path} is empty, and so no {COMPRESSIONS[path.suffix]} file")
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), COMPRESSIONS[path.suffix]) as stream:
            yield io.BufferedReader(stream), raw.tell


def _read_text(name: str, path: Path, _: str) -> Iterator[Item]:
    with _opened(path) as (stream, position):
        data = stream.read()
        read = position()
    try:
        yield Document(name=name, text=data.decode()), read
    except UnicodeDecodeError as error:
        yield Rejected(f"{path} is not UTF-8 text: bad byte at offset {error.start}; convert it"), read


def _read_lines(name: str, path: Path, field: str) -> Iterator[Item]:
    with _opened(path) as (stream, position):
        # A compressed stream reads ahead, so its first lines stand for more bytes than the others.
        before, first = 0, 1
        while data := stream.read(_BYTES_AT_ONCE):
            data += stream.readline()
            now = position()
            yield Lines(name=name, path=str(path), field=field, first=first, data=data), now - before
            before, first = now, first + data.count(b"\n")


def _of_json(row: bytes, field: str, name: str, where: str) -> Document | Rejected:
    try:
        value = json.loads(row.decode())
    except (ValueError, RecursionError) as error:
        return Rejected(f"{where}: not a JSON object in UTF-8 ({error})")
    if not isinstance(value, dict):
        return Rejected(f'{where}: not a JSON object; a row looks like {{"{field}": "..."}}')
    if field not in value:
        return Rejected(f'{where}: field "{field}" is missing; fix the row or name the field with --field')
    return of_text(value[field], field, name, where)


def of_text(text: Any, field: str, name: str, where: str) -> Document | Rejected:
    """A document, if what a row has for its text is text."""
    if not isinstance(text, str):
        return Rejected(f'{where}: field "{field}" is not a string; fix the row or name the field with --field')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Rejected(f"{where}: half a surrogate pair at character {error.start}; fix the row")
    return Document(name=name, text=text)


def text_bytes(path: Path, field: str) -> int:
    """About how many bytes of text a file has: of parquet those of the one column, of all others those on disk."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            groups = parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError):
            # Who reads it says what is wrong.
            return path.stat().st_size
        columns = [
            groups.row_group(g).column(c) for g in range(groups.num_row_groups) for c in range(groups.num_columns)
        ]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return path.stat().st_size


def _read_parquet(name: str, path: Path, field: str) -> Iterator[Item]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise UserError(
                    f'{path} has no column "{field}"; it has {", ".join(columns[:8])}: name one with --field'
                )
            kind = file.schema_arrow.field(field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if str(kind) not in _TEXT_TYPES:
                raise UserError(f'{path}: column "{field}" holds {kind}, not text; name another with --field')
            each, number = path.stat().st_size / max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    share = round(each * number) - round(each * (number - 1))
                    where = f"{path}: row {number}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        yield (
                            Rejected(f'{where}: field "{field}" is not UTF-8 (byte {error.start}); fix the row'),
                            share,
                        )
                        continue
                    yield of_text(text, field, f"{name}:{number}", where), share
    except pyarrow.ArrowException as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a parquet file, or a damaged one: {reason}") from error
