"""Files that a run logs into, on a disk that may be full or away for a while: training goes on, and they catch up."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

KEPT = 100_000
"""Rows that wait for the disk at most: some 30 MB. Of more the first are lost."""

PAUSE = 60.0
"""Seconds before TensorBoard's events are tried again: each attempt makes a file, and a traceback where it fails."""


class Trouble:
    """That a file cannot be written: said once, and once when it can be again.

    Args:
        name: of the file.
        say: called with a line.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._known = False

    def found(self, error: OSError, then: str) -> None:
        """The file could not be written; `then` says what happens."""
        if not self._known:
            self._say(f"warning: {self._name} cannot be written ({error.strerror or error}): {then}")
        self._known = True

    def over(self, result: str) -> None:
        """The file was written; `result` says what has become of what could not be."""
        if self._known:
            self._say(f"{self._name} is written again: {result}")
        self._known = False


class RowFile:
    """A file of lines, each written at once and whole, so that a kill loses none that was reported.

    What the disk does not take waits, and is written before the next line: no line is missing, and none is half there.

    Args:
        path: the file; it is appended to.
        say: called with a line of text on what cannot be written, and on what can be again.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._trouble = Trouble(path.name, say)
        self._waiting: deque[bytes] = deque(maxlen=KEPT)
        self._lost = 0
        self._size: int | None = None
        self._file: FileIO | None = self._open()

    @property
    def waits(self) -> bool:
        """Whether there are lines that the disk has not taken yet."""
        return bool(self._waiting)

    def write(self, line: str) -> None:
        """Append a line, after those that wait."""
        self._lost += len(self._waiting) == KEPT
        self._waiting.append(line.encode())
        self._write_waiting()

    def close(self) -> None:
        """Close the file, after a last attempt to write what waits."""
        self._write_waiting()
        if self._waiting:
            self._say(f"warning: {self._lost + len(self._waiting)} rows are missing in {self._path.name}")
        self._release()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._trouble.found(error, f"its rows, {KEPT:,} at most, wait until it can be")
            # Opened anew for the next line: a file server's handle may be stale for good.
            self._release()
        else:
            self._trouble.over(f"{self._lost or 'no'} rows are missing")
            self._lost = 0

    def _open(self) -> FileIO:
        file = FileIO(self._path, "ab")
        try:
            if self._size is not None and os.fstat(file.fileno()).st_size > self._size:
                # The first half of a line, which could not be taken back when it was written.
                file.truncate(self._size)
            self._size = os.fstat(file.fileno()).st_size
        except OSError:
            file.close()
            raise
        return file

    def _append(self, line: bytes) -> None:
        self._file = self._file or self._open()
        assert self._size is not None
        left = memoryview(line)
        try:
            while left:
                # A disk that fills up takes a part.
                left = left[self._file.write(left) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(line)

    def _release(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                # A file server may say only now what it has not kept.
                self._trouble.found(error, "its last rows may be missing")
            self._file = None


class Board:
    """TensorBoard's event files. What cannot be written is left out; a later one goes into a new file.

    Args:
        folder: where they are.
        purge_step: events of this step and later ones, of an earlier process, are to be hidden.
        say: called with a line on what cannot be written, and on what can be again.

    Raises:
        OSError: if none can be made.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._trouble = Trouble("TensorBoard's event file", say)
        self._again = 0.0
        self._writer: SummaryWriter | None = self._open(purge_step)

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step)

    def add(self, scalars: Mapping[str, float | None], step: int, *, disk_is_well: bool) -> None:
        """Write those of the scalars that have a value.

        Args:
            scalars: by name.
            step: after which they were measured.
            disk_is_well: whether another file of the folder could be written; one that failed is not tried before.
        """
        if self._writer is None and (not disk_is_well or time.monotonic() < self._again):
            return
        try:
            if self._writer is None:
                self._writer = self._open()
                self._trouble.over("its last events before that, and those until now, are missing")
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            # Raised by its thread, some time ago, which is dead now.
            self._again = time.monotonic() + PAUSE
            self._trouble.found(error, "events are left out until it can be")
            self.close()

    def close(self) -> None:
        """Write what its thread has not written yet, and close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._trouble.found(error, "its last events are missing")
