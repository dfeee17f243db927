"""Whose turn it is in a run folder, and how the last turn ended.

`end.json` says how: launchers change exit codes, and a job script has to know whether to go on. It says "running" while
the run lasts, so that of one that was killed without a word it says so for ever: its lock is gone by then.
A job may name a file of its own for the same (`SLOPE_END_FILE`). There a run also says that it was refused before its
folder was known to be its own, and nothing in it is another job's.
`history.jsonl` keeps every turn: a "running" row at its start, and a row at its end if there was time for one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slope_dist.errors import UnfinishedError, UserError
from slope_dist.files import read_bounded

END = "end.json"
END_FILE = "SLOPE_END_FILE"
HISTORY = "history.jsonl"
LOCK = ".lock"

How = Literal["running", "finished", "stopped", "failed"]

_MAX_HISTORY_BYTES = 2**26

PATIENCE = 15.0
"""Seconds to wait for a job that is just leaving: a requeued one may be started before the old one is gone."""


class Turn:
    """Rank 0's hold on a run folder.

    The lock is the system's (flock), which a process loses however it ends, and which NFS 4 and Lustre (mounted with
    -o flock) keep over machines. Where there is none a warning is all there can be.

    Args:
        folder: the run folder; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warning: str | None = None
        self._lock: int | None = None

    def take(self) -> None:
        """Take the folder, if it exists; nothing if it is held already.

        Raises:
            UnfinishedError: if another process keeps it for `PATIENCE` seconds.
        """
        if self._lock is not None or not os.path.isdir(self.folder):
            return
        try:
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            # Who only looks (the run is finished) needs no lock; who would write is refused by what comes next.
            self.warning = f"{self.folder / LOCK} cannot be made ({error.strerror}): nothing keeps a second job out"
            return
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    self.warning = (
                        f"{self.folder / LOCK} cannot be locked ({error.strerror}): nothing keeps a second job out"
                    )
                    break
                if time.monotonic() > end:
                    holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
                    os.close(lock)
                    raise UnfinishedError(
                        f"run.folder {self.folder} is in use by {holder}; wait for it, stop it "
                        f"(touch {self.folder / 'stop'}), or choose another run.folder"
                    ) from None
            time.sleep(0.2)
        self._lock = lock

    def sign(self) -> None:
        """Say in the lock who has it."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}{_job()}".encode(), 0)

    def release(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_end(folder: Path | None, how: How, **details: Any) -> None:
    """Replace `end.json`, and add to `history.jsonl`: {"how", "time", "host", "pid", "job", ...details}.

    As far as the disk allows: that a run cannot say how it ended must not change how it ends.

    Args:
        folder: the run folder; None where it may be another run's: then only the job's own file is written.
        how: how the run ends, or that it runs.
        details: what else to say.
    """
    content = {
        "how": how,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        **details,
    }
    line = json.dumps(content) + "\n"
    if os.environ.get(END_FILE):
        # Where the job's script, in another working directory, finds the checkpoints.
        whose = {"folder": None if folder is None else str(folder.absolute())}
        if how == "running":
            _remove_partial(Path(os.environ[END_FILE]))
        _replace(Path(os.environ[END_FILE]), json.dumps(content | whose) + "\n")
    if folder is None:
        return
    if how == "running":
        _remove_partial(folder / END)
    _replace(folder / END, line)
    with contextlib.suppress(OSError), (folder / HISTORY).open("a+b") as file:
        # After a line that a full disk cut short.
        torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * torn + line.encode())


def _replace(path: Path, text: str) -> None:
    # Its own: when rank 0 is lost, one rank on each machine writes.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        try:
            partial.write_text(text)
            os.replace(partial, path)
        except OSError:
            partial.unlink()


def _remove_partial(path: Path) -> None:
    """Remove what writers of `path` have left that were killed."""
    with contextlib.suppress(OSError):
        for partial in path.parent.glob(f".{glob.escape(path.name)}.*partial"):
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Part:
    """One turn in a run folder.

    Attributes:
        start: its "running" row, with the step that it went on from.
        end: how it ended; None if it is under way, or was killed without a word.
    """

    start: dict[str, Any]
    end: dict[str, Any] | None


def read_history(folder: Path) -> list[Part]:
    """The turns in a run folder, first to last; none where there is no file. Lines that a kill cut short are left out.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        lines = read_bounded(folder / HISTORY, _MAX_HISTORY_BYTES).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder / HISTORY} cannot be read: {error.strerror or error}") from error
    parts: list[Part] = []
    for line in lines:
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        if row.get("how") == "running":
            parts.append(Part(row, None))
        elif parts and parts[-1].end is None:
            # When rank 0 is lost, one rank on each machine says so: the first is enough.
            parts[-1] = Part(parts[-1].start, row)
    return parts


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f" (SLURM job {job})" if job else ""
