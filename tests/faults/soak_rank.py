"""A rank of a soaked run: the real program, and a thread that does to it what a file asks for.

Started by the launcher, as `soak_rank.py <folder of faults> <arguments of launch/pretrain.py>`. A file `rank-<number>`
in that folder holds the name of a fault; it is removed when the fault has been armed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOOK_EVERY = 0.1
BAD_DISK_SECONDS = 3.0

_armed: dict[str, float] = {}
"""Faults that wait for their place in the program, and since when."""


def _hold_the_lock() -> None:
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def _arm(name: str) -> Callable[[], None]:
    return lambda: _armed.update({name: time.monotonic()})


FAULTS: dict[str, Callable[[], None]] = {
    "hold the lock": _hold_the_lock,
    "segfault": lambda: ctypes.string_at(0) and None,
    "abort": os.abort,
    "stuck loader": _arm("stuck loader"),
    "skip a collective": _arm("skip a collective"),
    "exception": _arm("exception"),
    "MemoryError": _arm("MemoryError"),
    "bad disk": _arm("bad disk"),
}


def _listen(file: Path) -> None:
    while True:
        time.sleep(LOOK_EVERY)
        if file.exists():
            name = file.read_text()
            file.unlink()
            FAULTS[name]()


def _prepare_places() -> None:
    """Let the reader of batches, the agreement of ranks and the disk fail once they are asked to."""
    from slope_dist.checkpoint import tensor_file, writer
    from slope_dist.data.sampling import BatchReader
    from slope_dist.training.trainer import Trainer

    batch, asked, durable = BatchReader.batch, Trainer._asked_to_stop, tensor_file.durable_file

    def read(self: Any, step: int, positions: Any) -> Any:
        if _armed.pop("stuck loader", None):
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        if _armed.pop("exception", None):
            raise RuntimeError("a device that has fallen off the bus")
        if _armed.pop("MemoryError", None):
            raise MemoryError
        return batch(self, step, positions)

    def agree(self: Trainer) -> bool:
        return False if _armed.pop("skip a collective", None) else asked(self)

    @contextmanager
    def opened(path: Path) -> Iterator[Any]:
        if time.monotonic() - _armed.get("bad disk", -BAD_DISK_SECONDS) < BAD_DISK_SECONDS:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        with durable(path) as file:
            yield file

    BatchReader.batch = read  # type: ignore[method-assign]
    Trainer._asked_to_stop = agree  # type: ignore[method-assign]
    tensor_file.durable_file = writer.durable_file = opened


def main() -> int:
    """Be a rank; returns its exit code."""
    # deepspeed puts --local_rank before the script's own arguments.
    folder, *arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    file = Path(folder) / f"rank-{os.environ['RANK']}"
    file.unlink(missing_ok=True)
    from launch.pretrain import main as pretrain

    _prepare_places()
    threading.Thread(target=_listen, args=(file,), name="faults", daemon=True).start()
    return pretrain(arguments)


if __name__ == "__main__":
    sys.exit(main())
