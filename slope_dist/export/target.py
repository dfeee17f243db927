"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from slope_dist.checkpoint.retention import sync_folder
from slope_dist.checkpoint.tensor_file import durable_file
from slope_dist.errors import UserError

SPARE_BYTES = 16 * 2**20
"""Room left for the small files, and for what the file system itself needs."""


@contextlib.contextmanager
def new_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends, and is removed if the block fails.

    Args:
        target: must not exist; its parents are made.
        needed_bytes: of what will be written.

    Raises:
        UserError: if there is something at `target`, no room, or the file system refuses to write.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} is there already; remove it, or name another --output")
    temporary = target.with_name(f"{target.name}.tmp-{uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_without_room(target.parent, needed_bytes, "name another --output")
        temporary.mkdir()
        place = temporary
        try:
            yield temporary
            sync_folder(temporary)
            # A rename would put it inside a folder that has come up meanwhile, or replace an empty one.
            if os.path.lexists(target):
                raise UserError(f"{target} is there already; remove it, or name another --output")
            os.rename(temporary, target)
            place = target
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{target} was not written: {what}{error.strerror or error}") from error


def refuse_without_room(folder: Path, needed_bytes: int, instead: str) -> None:
    """Refuse what would not fit beside the files that are there.

    Args:
        folder: exists.
        needed_bytes: of what will be written.
        instead: what helps where no room can be made.

    Raises:
        UserError: if the file system of `folder` has too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + SPARE_BYTES:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free, and {needed_bytes / 1e9:.2f} GB are needed; make room, or "
            f"{instead}"
        )


def write_file(path: Path, data: bytes) -> None:
    """A small file, on disk on return."""
    with durable_file(path) as file:
        file.write(data)
