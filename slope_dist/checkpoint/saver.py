"""Saving beside training: from a copy in host memory, one save at a time, again where one fails.

Training stops for the copy. A thread of each rank then writes, votes over a process group of its own, and removes old
checkpoints; what became of it is told when it is asked for. A failed save is tried again from the same copy, after
pauses of 1, 2, 4, ... 60 s, until it succeeds or the next one is due, which is newer and takes its place. A save that
training waits for is tried for as long as the caller has patience.
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
from slope_dist.watching.heartbeat import beat

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
LONGEST_WAIT = 15.0
"""The longest pause where training waits: a longer one gains nothing, and a request to stop is heard after it."""

ATTEMPTS = 4
"""How often a save that training waits for is tried at least, be there no patience left or no hope."""

_SLOWEST = timedelta(hours=4)
"""How much longer than another's one rank's files may take."""

Patience = Callable[[], float]
"""For how many seconds more a save that training waits for is worth trying; asked on all ranks, and rank 0's counts."""

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
        hear: called, on this rank, before training waits for another attempt: `outcomes` has news then.
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
        hear: Callable[[], None] | None = None,
        first_pause: float = FIRST_PAUSE,
        progress: writer.Progress | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._retention = retention
        self._asynchronous = asynchronous
        self._say = say
        self._hear = hear or (lambda: None)
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
        self,
        step: int,
        export: Export,
        identity: dict[str, Any],
        config: dict[str, Any],
        *,
        patience: Patience | None = None,
    ) -> None:
        """Save the state of now; returns when training may go on.

        Args:
            step: optimizer steps taken.
            export: this rank's live fragments, and the scalars; may be called twice.
            identity: see `writer.save`.
            config: see `writer.save`.
            patience: return when it is committed or, `ATTEMPTS` or more attempts later, this is at an end.

        Raises:
            BaseException: what ended the thread of the save before; see `outcomes`.
        """
        start = time.perf_counter()
        self.wait()
        beside = self._asynchronous and patience is None
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
            self._try(save, None, patience or _no_patience)
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
            self._try(save, stall, _no_patience)
        except BaseException as error:
            # No failure of a save, which all ranks would have voted on: a lost rank, or a defect.
            self._error = error

    def _try(self, save: _Save, stall: float | None, patience: Patience) -> None:
        """Try until it works or is not worth it any more; `stall` is None where training waits for it."""
        pause = self._first_pause
        for attempt in count(1):
            try:
                saved = self._attempt(save)
                break
            except CheckpointError as error:
                failure = error
            self._retention.sweep()
            if stall is not None:
                goes_on = self._pause_beside(save.step, failure, pause)
            else:
                goes_on = self._pause_training(save.step, failure, pause, patience, enough=attempt >= ATTEMPTS)
            if not goes_on:
                return
            pause = min(2 * pause, LONGEST_PAUSE)
        seconds = time.perf_counter() - save.start
        self._retention.trust(saved.path, saved.sizes)
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

    def _pause_beside(self, step: int, failure: CheckpointError, seconds: float) -> bool:
        """Wait before the next attempt, beside training; whether all ranks make one."""
        self._tell(step, failure, None if self._overtaken.is_set() else duration_text(seconds))
        self._overtaken.wait(seconds)
        return not any(collectives.all_gather_json(self._overtaken.is_set(), self._group))

    def _pause_training(
        self, step: int, failure: CheckpointError, seconds: float, patience: Patience, *, enough: bool
    ) -> bool:
        """The same while training waits; `enough` attempts are made, so that only patience is a reason for another."""
        in_vain = isinstance(failure, writer.UnsavableError)
        # One clock, so that every rank makes the same attempts.
        left = 0.0 if in_vain else collectives.broadcast_json(patience(), self._group)
        if enough and left <= 0:
            self._tell(step, failure, None)
            return False
        seconds = min(seconds, LONGEST_WAIT)
        if left > 0:
            seconds = min(seconds, left)
            self._tell(step, failure, f"{duration_text(seconds)}, and so on for {duration_text(left)}")
        else:
            self._tell(step, failure, duration_text(seconds))
        self._hear()
        beat()
        time.sleep(seconds)
        return True

    def _tell(self, step: int, failure: CheckpointError, again_in: str | None) -> None:
        then = "it is given up" if again_in is None else f"trying again in {again_in}"
        self._outcomes.put(Outcome(step, None, (f"{failure}; {then}",)))


def _no_patience() -> float:
    return 0.0
