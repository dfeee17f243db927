"""What stays of old checkpoints, and removal that touches nothing the writer did not write."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4

from slope_dist.checkpoint.format import FILE_NAME, LEFTOVER_NAME, MANIFEST, CheckpointError, step_of
from slope_dist.checkpoint.reader import Checkpoint, Stamp, check_listing, stamp_of
from slope_dist.parallel.collectives import rank

MIN_KEPT = 2
"""With one alone, a damaged newest checkpoint would be the end of the run."""


class Retention:
    """Which checkpoints of a run stay: the newest `keep` that are known to be whole, and milestones.

    Rank 0 acts; on other ranks nothing happens. What this process has written, or read in full, is known to be whole;
    an older one is hashed, once, before anything is removed in reliance on it. Folders that are damaged, and any that
    hold a file of someone else, are neither counted nor touched.

    A manifest is read again only if it has changed: to decode one of many ranks takes a minute, and training stands
    still meanwhile.

    Args:
        checkpoints: the folder of all checkpoints of the run.
        keep: how many stay, at least 2.
        every: those whose step is a multiple of this stay for good; None: no others stay.

    Raises:
        ValueError: if `keep` is below 2.
    """

    def __init__(self, checkpoints: Path, keep: int, every: int | None = None) -> None:
        if keep < MIN_KEPT:
            raise ValueError(f"keep = {keep}: at least {MIN_KEPT} checkpoints stay")
        self._checkpoints = checkpoints
        self._keep = keep
        self._every = every
        self._whole: set[str] = set()
        self._seen: dict[str, tuple[Stamp, Mapping[str, int]]] = {}

    def trust(self, folder: Path, sizes: Mapping[str, int]) -> None:
        """Take note that this process has written the checkpoint, or verified it.

        Args:
            folder: its folder.
            sizes: bytes of each of its manifest's files; of use on rank 0.
        """
        if rank() != 0:
            return
        self._whole.add(folder.name)
        with contextlib.suppress(OSError):
            self._seen[folder.name] = stamp_of(os.lstat(folder / MANIFEST)), sizes

    def prune(self, *, progress: Callable[[str], None] | None = None) -> list[str]:
        """Remove what need not stay, and what interrupted saves and removals left behind.

        To be called when no save is under way.

        Args:
            progress: called at named points of each removal ("trashed", "removed"): for tests and logs.

        Returns:
            One line for each folder that could not be removed: a nuisance, no reason to stop training.
        """
        if rank() != 0:
            return []
        notify = progress or (lambda _: None)
        problems = []
        try:
            for name in self._dispensable(os.listdir(self._checkpoints)):
                trash = set_aside(self._checkpoints / name)
                notify("trashed")
                discard(trash)
                self._seen.pop(name, None)
                notify("removed")
        except OSError as error:
            problems.append(f"{self._checkpoints}: old checkpoints could not be removed: {error}")
        return problems + self.sweep()

    def sweep(self) -> list[str]:
        """Remove what interrupted saves and removals left behind; see `prune`, which does it too."""
        if rank() != 0:
            return []
        try:
            for name in self._leftovers():
                discard(self._checkpoints / name)
            return [f"{self._checkpoints / name}: could not be removed" for name in self._leftovers()]
        except OSError as error:
            return [f"{self._checkpoints}: what is left of interrupted saves could not be removed: {error}"]

    def _leftovers(self) -> list[str]:
        return sorted(filter(LEFTOVER_NAME.fullmatch, os.listdir(self._checkpoints)))

    def _dispensable(self, names: list[str]) -> list[str]:
        """Names of checkpoints that need not stay, the oldest first."""
        steps = {name: step for name in names if (step := step_of(name)) is not None}
        newest_first = sorted(steps, key=lambda name: -steps[name])
        whole = 0
        for position, name in enumerate(newest_first):
            if whole == self._keep:
                older = [name for name in newest_first[position:] if self._every is None or steps[name] % self._every]
                return [name for name in reversed(older) if self._looks_complete(name)]
            # Without older ones nothing depends on whether this one is whole.
            whole += position + 1 < len(newest_first) and self._is_whole(name)
        return []

    def _is_whole(self, name: str) -> bool:
        if name in self._whole:
            return self._looks_complete(name)
        try:
            checkpoint = Checkpoint.open(self._checkpoints / name)
        except CheckpointError:
            return False
        self.trust(checkpoint.path, checkpoint.sizes)
        return True

    def _looks_complete(self, name: str) -> bool:
        """As the function, of a manifest that may have been read before."""
        folder = self._checkpoints / name
        try:
            stamp = stamp_of(os.lstat(folder / MANIFEST))
            before, sizes = self._seen.get(name, (None, {}))
            if stamp == before:
                check_listing(folder, sizes)
            else:
                self._seen[name] = stamp, Checkpoint.open(folder, verify=False).sizes
        except (CheckpointError, OSError):
            return False
        return True


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
