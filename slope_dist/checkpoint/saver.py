"""Saving beside training: from a copy in host memory, one save at a time, again where one fails.

Training stops for the copy. A thread of each rank then writes, votes over a process group of its own, and removes old
checkpoints; what became of it is told when it is asked for. A failed save is tried again from the same copy, after
pauses of 1, 2, 4, ... 60 s, until it succeeds or the next one is due, which is newer and takes its place.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from slope_dist.checkpoint import writer
from slope_dist.checkpoint.format import CheckpointError
from slope_dist.checkpoint.host_copy import HostCopy
from slope_dist.checkpoint.retention import Retention
from slope_dist.parallel import collectives
from slope_dist.parallel.fragments import Fragment
from slope_dist.transfer import Transfer, duration_text

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0

ATTEMPTS = 4
"""How often a save that training waits for is tried: the last one of a run, and every one that has no copy."""

_SLOWEST = timedelta(hours=4)
"""How much longer than another's one rank's files may take."""

Export = Callable[[], tuple[Iterable[Fragment], dict[str, Any]]]


@dataclass(frozen=True)
class Outcome:
    """What became of a save, or of an attempt.

    Attributes:
        step: whose state it was.
        path: the folder of the checkpoint; None if there is none.
        problems: one line for what went wrong, be it with the save or with the removal of old ones.
        bytes: size of the checkpoint.
        stall_seconds: how long training stood still.
        seconds: from the beginning to the commit.
        copy_bytes: host memory that this rank holds for the copy.
    """

    step: int
    path: Path | None
    problems: tuple[str, ...]
    bytes: int = 0
    stall_seconds: float = 0.0
    seconds: float = 0.0
    copy_bytes: int = 0


@dataclass(frozen=True)
class _Save:
    """What is to be saved, and since when."""

    step: int
    fragments: list[Fragment]
    scalars: dict[str, Any]
    identity: dict[str, Any]
    config: dict[str, Any]
    start: float


class Saver:
    """Saves the checkpoints of a run. Collective: every rank makes one and calls its methods equally often.

    What interrupted saves have left is removed at once, and after each attempt that fails: it may be what
    fills the disk.

    Args:
        checkpoints: the folder of all checkpoints of the run, into which nobody else saves.
        retention: which of them stay.
        asynchronous: write beside training, from a copy.
        say: called, on this rank, with a line on a save that takes long; perhaps from another thread.
        first_pause: seconds before the second attempt of a save.
        progress: for tests, see `writer.save`.
    """

    def __init__(
        self,
        checkpoints: Path,
        retention: Retention,
        *,
        asynchronous: bool,
        say: Callable[[str], None] | None = None,
        first_pause: float = FIRST_PAUSE,
        progress: writer.Progress | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._retention = retention
        self._asynchronous = asynchronous
        self._say = say
        self._first_pause = first_pause
        self._progress = progress
        self._copy = HostCopy()
        # Collectives of two threads on one group could meet each other's on other ranks.
        self._group: dist.ProcessGroup | None = None
        if collectives.world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=_SLOWEST)
        self._thread: threading.Thread | None = None
        self._overtaken = threading.Event()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._error: BaseException | None = None
        # What cannot be removed is told after the next save.
        self._retention.sweep()

    def save(
        self, step: int, export: Export, identity: dict[str, Any], config: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save the state of now; returns when training may go on.

        Args:
            step: optimizer steps taken.
            export: this rank's live fragments, and the scalars; may be called twice.
            identity: see `writer.save`.
            config: see `writer.save`.
            wait: return when it is committed, or has failed `ATTEMPTS` times.

        Raises:
            BaseException: what ended the thread of the save before; see `outcomes`.
        """
        start = time.perf_counter()
        self.wait()
        beside = self._asynchronous and not wait
        if beside:
            live, scalars = export()
            try:
                fragments, problem = self._copy.take(live), None
            except (MemoryError, RuntimeError) as error:
                fragments, problem = [], f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            problems = [found for found in collectives.all_gather_json(problem) if found is not None]
            if problems:
                self._copy = HostCopy()
                self._outcomes.put(
                    Outcome(step, None, (f"no copy of step {step} ({problems[0]}): training waits while it is saved",))
                )
                beside = False
        if not beside:
            live, scalars = export()
            fragments = list(live)
        save = _Save(step, fragments, scalars, identity, config, start)
        if not beside:
            self._try(save, None)
            return
        self._overtaken.clear()
        stall = time.perf_counter() - start
        self._thread = threading.Thread(target=self._work, args=(save, stall), name="save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Let the save under way end: committed, or given up after the attempt it is in.

        Raises:
            BaseException: what ended its thread; see `outcomes`.
        """
        if self._thread is not None:
            self._overtaken.set()
            self._thread.join()
            self._thread = None
        self._raise()

    def linger(self, seconds: float) -> None:
        """Give the save under way so much time to end, in a run that fails: it may be all but committed."""
        if self._thread is not None:
            self._thread.join(seconds)

    def outcomes(self) -> Iterator[Outcome]:
        """What has become known on this rank since the last call.

        Raises:
            BaseException: what ended the thread of a save otherwise than by a vote: that a rank was lost, or a defect.
                The other ranks wait for this one then, so the run is to end.
        """
        self._raise()
        while True:
            try:
                yield self._outcomes.get_nowait()
            except queue.Empty:
                return

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the save under way, and let go of the copy and the process group."""
        self.wait()
        self._copy = HostCopy()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _work(self, save: _Save, stall: float) -> None:
        """The thread's life."""
        try:
            self._try(save, stall)
        except BaseException as error:
            # No failure of a save, which all ranks would have voted on: a lost rank, or a defect.
            self._error = error

    def _try(self, save: _Save, stall: float | None) -> None:
        """Try until it works or is not worth it any more; `stall` is None where training waits for it."""
        pause = self._first_pause
        for attempt in count(1):
            try:
                saved = self._attempt(save)
                break
            except CheckpointError as error:
                given_up = attempt == ATTEMPTS if stall is None else self._overtaken.is_set()
                then = "it is given up" if given_up else f"trying again in {duration_text(pause)}"
                self._outcomes.put(Outcome(save.step, None, (f"{error}; {then}",)))
                self._retention.sweep()
            if not self._pause(pause, goes_on=not given_up, beside=stall is not None):
                return
            pause = min(2 * pause, LONGEST_PAUSE)
        seconds = time.perf_counter() - save.start
        self._retention.trust(saved.path)
        problems = tuple(self._retention.prune())
        standing = seconds if stall is None else stall
        held = self._copy.bytes
        self._outcomes.put(Outcome(save.step, saved.path, problems, saved.bytes, standing, seconds, held))

    def _attempt(self, save: _Save) -> writer.Saved:
        return writer.save(
            self._checkpoints,
            save.step,
            save.fragments,
            save.scalars,
            save.identity,
            save.config,
            group=self._group,
            progress=self._progress,
            transfer=Transfer(f"saving step {save.step}", self._say),
        )

    def _pause(self, seconds: float, *, goes_on: bool, beside: bool) -> bool:
        """Wait before the next attempt; whether all ranks make one."""
        if not beside:
            # Every rank counts the same attempts.
            if goes_on:
                time.sleep(seconds)
            return goes_on
        self._overtaken.wait(seconds)
        return not any(collectives.all_gather_json(self._overtaken.is_set(), self._group))
