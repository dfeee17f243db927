"""Being asked to stop: by a signal, by a file in the run folder, or by the end of the launcher.

A signal reaches one rank, some or all of them; none may leave alone. So a handler only takes note, and the ranks agree
at the next boundary: after a step, or between two batches of an evaluation. The run then writes a checkpoint and every
rank leaves. Before the first step, when there is nothing to save, a signal ends its rank at once, and so the others.

    SIGTERM, SIGUSR1     a scheduler's early warning, `scancel`, `kill`
    SIGINT               Ctrl-C; a second one ends the process at once
    <run folder>/stop    `touch` it: who may write the folder may stop the run; removed when the run ends for it
    $SLOPE_STOP_FILE     the same by a job's script, whose launcher passes no signals on; it stays, and stands for the
                         SIGUSR1 that a rank was sent before it had handlers
    launcher gone        deepspeed, torchrun or srun died without ending its ranks

Not SIGUSR2, which some debuggers and NCCL's own tools use.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from slope_dist.parallel import collectives
from slope_dist.parallel.environment import Environment

STOP_FILE = "stop"
JOB_STOP_FILE = "SLOPE_STOP_FILE"

_LOOK_EVERY = 1.0
"""Seconds between two looks for the stop file and the launcher: on network file systems a look takes milliseconds."""

_STOP_FILE_FOUND = f"the file {STOP_FILE}"

REASONS = ("", "the end of its launcher", _STOP_FILE_FOUND, "its job script", "SIGINT", "SIGUSR1", "SIGTERM")
"""Why a run is asked to stop. Ranks with different reasons take the last of them."""

END_PATIENCE, STOP_PATIENCE = 600.0, 120.0
"""Seconds for which the last save is tried: what file servers take to come back, and, where a stop is asked for, what
an early signal of 300 s leaves after a step and the attempt that is under way."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopNow(BaseException):
    """Asked to stop before there was anything to save; not an error, so handlers of errors must not see it."""


class Stopper:
    """Hears of requests to stop. One in a process, made by its main thread.

    Args:
        environment: this process among the others.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._owner = os.getpid()
        self._launcher = os.getppid() if environment.launcher != "none" else None
        self._above = None if self._launcher is None else _deepspeed_above(self._launcher)
        self._folder: Path | None = None
        self._job_file = Path(os.environ[JOB_STOP_FILE]) if os.environ.get(JOB_STOP_FILE) else None
        self._code = 0
        self._deferred = False
        self._looked = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Install the handlers. Signals end the process by `StopNow` until `defer`.

        Raises:
            StopNow: if the early signal has come before.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._heard)
        # launch/pretrain.py has ignored the signal so far; the job's script makes its file before it sends that.
        if self._job_file is not None and os.path.exists(self._job_file):
            self._note("SIGUSR1")
            raise StopNow("SIGUSR1")

    def defer(self, folder: Path) -> None:
        """From now on somebody asks `agreed` often enough.

        Args:
            folder: the run folder, where a stop file may appear.
        """
        self._folder = folder
        self._deferred = True

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def agreed(self) -> str:
        """Why all ranks are to stop now; "" if they are not. Collective."""
        self._look()
        code = self._code
        if collectives.world_size() > 1:
            flag = torch.tensor([code], dtype=torch.int32, device=collectives.device())
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            code = int(flag)
        return REASONS[code]

    def obeyed(self, reason: str) -> None:
        """Remove the stop file if the run ends for it: it asks for one stop, not for all that follow."""
        if reason == _STOP_FILE_FOUND and self._folder is not None and self._environment.is_first:
            # The state is saved: a file that stays, and stops the next part too, is no failure of this one.
            with contextlib.suppress(OSError):
                (self._folder / STOP_FILE).unlink()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        gone = self._launcher is not None and os.getppid() != self._launcher
        if gone or (self._above is not None and not _lives(self._above)):
            self._note("the end of its launcher")
        # os.path's, which raises nothing: a file server in trouble for a moment must not end the run.
        if self._environment.is_first and self._folder is not None and os.path.exists(self._folder / STOP_FILE):
            self._note(_STOP_FILE_FOUND)
        if self._environment.is_first and self._job_file is not None and os.path.exists(self._job_file):
            self._note("its job script")

    def _note(self, reason: str) -> None:
        self._code = max(self._code, REASONS.index(reason))

    def _heard(self, number: int, frame: FrameType | None) -> None:
        # Forked children (data workers, compilers) inherit the handler, and must neither save nor stop the run.
        if os.getpid() != self._owner:
            return
        name, first = signal.Signals(number).name, not self._code
        if number == signal.SIGINT and (self._code or not self._deferred):
            raise KeyboardInterrupt
        self._note(name)
        # A second one, such as the launcher's after another rank has left, would hit whoever handles the first.
        if first and not self._deferred:
            raise StopNow(name)


class LastSave:
    """For how many seconds more the last save of a run is worth trying. Collective.

    Args:
        stopper: hears of requests to stop meanwhile, which leave less time.
        stopped: whether the run ends for one.
    """

    def __init__(self, stopper: Stopper, *, stopped: bool) -> None:
        self._stopper = stopper
        self._hurried = stopped
        self._deadline = time.monotonic() + (STOP_PATIENCE if stopped else END_PATIENCE)

    def __call__(self) -> float:
        """See above; below or at 0 it is to be given up."""
        if self._stopper.agreed() and not self._hurried:
            self._hurried = True
            self._deadline = min(self._deadline, time.monotonic() + STOP_PATIENCE)
        return self._deadline - time.monotonic()


_DEEPSPEED = {"deepspeed", "deepspeed.launcher.runner"}


def _deepspeed_above(launcher: int) -> psutil.Process | None:
    """The `deepspeed` command or module that started the process which started this one: it dies alone of a signal."""
    try:
        above = psutil.Process(launcher).parent()
        if above is not None and any(Path(word).name in _DEEPSPEED for word in above.cmdline()[:3]):
            return above
    except psutil.Error:
        # Somebody else's process, or one that has gone already: the parent is watched all the same.
        pass
    return None


def _lives(process: psutil.Process) -> bool:
    try:
        # One that nobody has waited for yet is still listed.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
