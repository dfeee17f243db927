"""A folder that appears whole or not at all, made in a sibling that an interrupted attempt leaves for the next one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from slope_dist.data.journal import JOURNAL
from slope_dist.errors import UnfinishedError, UserError

_MARK = "being-prepared-by-slope-dist"


def holds_something(folder: Path) -> bool:
    """Whether it is anything but an empty folder or nothing."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def kept(folder: Path) -> bool:
    """Whether an attempt at `folder` was interrupted that can be gone on with."""
    try:
        return (_partial_of(folder) / JOURNAL).exists()
    except OSError:
        return False


def _partial_of(folder: Path) -> Path:
    # A last name that is ".." or a link would put the sibling elsewhere than the folder that it is to become.
    real = Path(os.path.realpath(folder))
    return real.with_name(real.name + ".partial")


def _refuse_if_taken(folder: Path) -> None:
    if holds_something(folder):
        raise UserError(
            f"{folder} already holds a corpus or other files, which are never overwritten; "
            "remove it or name another folder"
        )


@contextmanager
def staged(folder: Path, names: Set[str], temporary: Set[str]) -> Iterator[Path]:
    """A folder `<folder>.partial` that becomes `folder`, on disk, if the body succeeds.

    If the body refuses its input, the folder goes. If anything else stops it, even a kill, a folder with a journal
    stays, and the next attempt is given it with what is in it.

    Args:
        folder: final place; must not exist or be empty.
        names: of the files that the body may make.
        temporary: those of them that are removed at the end.

    A mark inside it is locked while its process lives, which tells a leftover of ours from one in use.
    """
    _refuse_if_taken(folder)
    partial = _partial_of(folder)
    folder = Path(os.path.realpath(folder))
    _refuse_if_taken(folder)
    if folder == Path(os.path.realpath(os.curdir)):
        raise UserError(f"{folder} is the current folder, which cannot be replaced by a corpus; name one below it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = _lock(partial, names)
    try:
        # Another process may have finished between the first look and the lock.
        _refuse_if_taken(folder)
        if not (partial / JOURNAL).exists():
            remove(partial, names)
        yield partial
        for path in sorted(partial.iterdir()):
            fsync(path)
        fsync(partial)
        os.rename(partial, folder)
        fsync(folder.parent)
        # Last of all: until here the journal is what a next attempt goes on from. Left behind, they do no harm.
        remove(folder, temporary)
        (folder / _MARK).unlink()
    except BaseException as error:
        refused = isinstance(error, UserError) and not isinstance(error, UnfinishedError)
        # Whatever stops the clean-up, the next attempt does it again; the error to report is the first one.
        with suppress(OSError):
            if refused or not (partial / JOURNAL).exists():
                remove(partial, names)
                # The mark goes last, as without it the rest is not known to be ours.
                (partial / _MARK).unlink(missing_ok=True)
                partial.rmdir()
        raise
    finally:
        os.close(mark)


def _lock(partial: Path, names: Set[str]) -> int:
    """Make or take over the folder, and return the file descriptor that holds its lock."""
    while True:
        partial.mkdir(exist_ok=True)
        # A process that finishes meanwhile moves the folder away under our hands: then look again.
        with suppress(FileNotFoundError):
            found = set(os.listdir(partial))
            if found and (_MARK not in found or found - names - {_MARK}):
                raise UserError(f"{partial} is in the way and was not made by an earlier attempt; move it")
            mark = os.open(partial / _MARK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(mark), os.stat(partial / _MARK)):
                    return mark
            except BlockingIOError as error:
                os.close(mark)
                raise UserError(f"another process is writing {partial}; wait for it to end") from error
            except BaseException:
                os.close(mark)
                raise
            os.close(mark)


def remove(partial: Path, names: Set[str]) -> None:
    """Remove the files of these names; the journal first, as without it the others are nothing."""
    for name in sorted(set(os.listdir(partial)) & names, key=lambda name: name != JOURNAL):
        (partial / name).unlink()


def fsync(path: Path) -> None:
    """Put a file, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
