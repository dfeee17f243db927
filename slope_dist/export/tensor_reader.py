"""Tensors of safetensors files, read by rows: headers are checked when the files are opened, elements when read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export.stored import all_finite
from slope_dist.export.tensor_files import KNOWN_DTYPES
from slope_dist.output import visible

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
"""Of a file of tensors: none leaves its folder."""

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)


class TensorReader:
    """Files of one folder, mapped into memory; only the pages that hold wanted rows are read.

    Attributes:
        folder: where they lie.
        entries: every tensor of theirs, by name.
    """

    def __init__(self, folder: Path, files: Iterable[str], ignored: re.Pattern[str] | None = None) -> None:
        """Open the `files` of a folder and read their headers; tensors of `ignored` names are as if not there.

        Raises:
            UserError: naming the file, if one is no safetensors file, has a tensor of an unknown dtype, or one that
                another has too; or if its name would leave the folder.
        """
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._handles: dict[str, safe_open] = {}
        self._stamps: dict[str, Stamp] = {}
        self._ignored = ignored
        for file in files:
            if not FILE_NAME.fullmatch(file):
                raise UserError(f"{folder}: {visible(file)!r:.100} is not the name of a file of tensors in this folder")
            self._stamps[file] = stamp_of(folder / file)
            self._open(file)

    def expect(self, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Refuse other tensors than these, dtype and shape by name.

        Raises:
            UserError: naming the file, the tensor, what was expected and what found.
        """
        for name, (dtype, shape) in tensors.items():
            entry = self.entries.get(name)
            if entry is None:
                where = folder_or_file(self.folder, self._stamps)
                raise UserError(f"{where}: {name}: expected {describe(dtype, shape)}, found no such tensor")
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise UserError(f"{self.folder / entry.file}: {name}: expected {describe(dtype, shape)}, found {entry}")
        for name, entry in self.entries.items():
            if name not in tensors:
                raise UserError(
                    f"{self.folder / entry.file}: {visible(name)[:100]}: expected only the tensors of its model, found "
                    "this one too"
                )

    def read(
        self, name: str, start: int = 0, stop: int | None = None, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Rows [start, stop) of a tensor, or some `columns` of them, in memory of its own.

        Raises:
            UserError: if its file has changed since it was opened, or a number is NaN or infinite.
        """
        entry = self.entries[name]
        path = self.folder / entry.file
        # To touch a page that is no longer in the file would end the process.
        self._check_unchanged(entry.file)
        view = self._handles[entry.file].get_slice(name)
        found: Tensor = (view[start:stop] if columns is None else view[start:stop, columns[0] : columns[1]]).clone()
        self._check_unchanged(entry.file)
        if found.is_floating_point() and not all_finite(found):
            raise UserError(f"{path}: {name}: expected finite numbers, found NaN or infinity")
        return found

    @property
    def files(self) -> list[str]:
        """Names of the files."""
        return list(self._stamps)

    def metadata(self, file: str) -> dict[str, str]:
        """What the header of a file says beside its tensors."""
        return self._handles[file].metadata() or {}

    def place(self, name: str) -> Path:
        """The file of a tensor."""
        return self.folder / self.entries[name].file

    def _open(self, file: str) -> None:
        path = self.folder / file
        try:
            handle = safe_open(path, framework="pt")
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: expected safetensors, found: {visible(str(error))[:200]}") from error
        for name, found in slices.items():
            if self._ignored is not None and self._ignored.fullmatch(name):
                continue
            shown = visible(name)[:100]
            if name in self.entries:
                raise UserError(f"{path}: {shown}: expected it once, found it in {self.entries[name].file} too")
            dtype = KNOWN_DTYPES.get(found.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{path}: {shown}: expected a dtype among {', '.join(KNOWN_DTYPES)}, found {found.get_dtype()}"
                )
            self.entries[name] = Entry(file, dtype, tuple(found.get_shape()))
        self._handles[file] = handle

    def _check_unchanged(self, file: str) -> None:
        if stamp_of(self.folder / file) != self._stamps[file]:
            raise UserError(f"{self.folder / file}: expected it to stay as it was when it was opened, found it changed")


def folder_or_file(folder: Path, files: Collection[str]) -> Path:
    """Where something is missing: the file, if there is but one."""
    return folder / next(iter(files)) if len(files) == 1 else folder


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Dtype and shape as safetensors write them: "BF16 [64, 16]"."""
    return f"{next(name for name, known in KNOWN_DTYPES.items() if known == dtype)} {list(shape)}"


def stamp_of(path: Path) -> Stamp:
    """What changes when a file does: size, time of change, inode.

    Raises:
        UserError: if it is no plain file, such as a pipe, whose reader would wait.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: expected a plain file, found something else")
    return found.st_size, found.st_mtime_ns, found.st_ino
