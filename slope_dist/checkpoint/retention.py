"""What stays of old checkpoints, and removal that touches nothing the writer did not write."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from slope_dist.checkpoint.format import FILE_NAME, LEFTOVER_NAME, MANIFEST, CheckpointError, step_of
from slope_dist.checkpoint.reader import Checkpoint
from slope_dist.parallel.collectives import rank

MIN_KEPT = 2
"""With one alone, a damaged newest checkpoint would be the end of the run."""


def prune(checkpoints: Path, keep: int, *, progress: Callable[[str], None] | None = None) -> list[str]:
    """Remove all but the newest `keep` complete checkpoints, and what interrupted saves and removals left behind.

    To be called by all ranks after a save has returned; rank 0 acts. Only folders that look complete are counted and
    removed: damaged ones, and any that holds a file of someone else, stay where they are.

    Args:
        checkpoints: the folder of all checkpoints of a run.
        keep: how many stay, at least 2.
        progress: called at named points of each removal ("trashed", "removed"): for tests and logs.

    Returns:
        One line for each folder that could not be removed: a nuisance, no reason to stop training.

    Raises:
        ValueError: if `keep` is below 2.
    """
    if keep < MIN_KEPT:
        raise ValueError(f"keep = {keep}: at least {MIN_KEPT} checkpoints stay")
    if rank() != 0:
        return []
    notify = progress or (lambda _: None)
    problems = []
    try:
        names = sorted(os.listdir(checkpoints))
        for name in filter(LEFTOVER_NAME.fullmatch, names):
            discard(checkpoints / name)
        complete = [name for name in names if step_of(name) is not None and looks_complete(checkpoints / name)]
        for name in sorted(complete, key=lambda name: step_of(name) or 0)[:-keep]:
            trash = set_aside(checkpoints / name)
            notify("trashed")
            discard(trash)
            notify("removed")
        problems += [
            f"{checkpoints / name}: could not be removed"
            for name in sorted(os.listdir(checkpoints))
            if LEFTOVER_NAME.fullmatch(name)
        ]
    except OSError as error:
        problems.append(f"{checkpoints}: old checkpoints could not be removed: {error}")
    return problems


def looks_complete(folder: Path) -> bool:
    """Whether the manifest is whole and exactly its files lie beside it in their sizes; their bytes are not read."""
    try:
        Checkpoint.open(folder, verify=False)
    except CheckpointError:
        return False
    return True


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint's folder, so that a removal cut short leaves no half of it under its name.

    Returns:
        The new path, whose name no reader takes for a checkpoint.

    Raises:
        OSError: if it cannot be renamed.
    """
    trash = folder.with_name(f".trash-{folder.name}-{uuid4().hex}")
    os.rename(folder, trash)
    sync_folder(folder.parent)
    return trash


def discard(folder: Path) -> None:
    """Remove the writer's files from a folder, and the folder if nothing else lies in it; as far as it goes."""
    if folder.is_symlink():
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name == MANIFEST or FILE_NAME.fullmatch(name):
                os.unlink(folder / name)
        os.rmdir(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: if the file system fails to.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders at all, and say so by this.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
