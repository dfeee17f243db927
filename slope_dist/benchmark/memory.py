"""Measured peak memory of a piece of work: a device's allocator on CUDA, the kernel's high-water mark on the CPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def can_measure(device: torch.device) -> bool:
    """Whether this machine tells peaks: CUDA does, and Linux does for the CPU."""
    return device.type == "cuda" or _CLEAR.exists()


def peak_of(prepare: Callable[[], Callable[[], None]], device: torch.device) -> int:
    """Bytes by which `work = prepare(); work()` exceeds, at its worst, what was held before `work`.

    On the CPU this runs in a forked child, whose heap no earlier work has stretched. Call it before this process has
    computed anything on several threads: OpenMP's threads do not survive a fork, and the child would wait for them.

    Raises:
        RuntimeError: the child failed; its traceback is on stderr.
    """
    if device.type == "cuda":
        return _peak_on_cuda(prepare, device)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _measure_and_exit(prepare, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"the process that measures memory ended with code {os.waitstatus_to_exitcode(status)}")
    return int(answer)


def allocated(device: torch.device) -> int | None:
    """Bytes of all tensors on a GPU now; None on the CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def make_workspaces(device: torch.device) -> None:
    """Have a GPU's libraries take their workspaces now, for forward and for backward.

    They count as tensors of whoever multiplies first, and are kept.
    """
    if device.type == "cuda":
        x = torch.ones(64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        torch.nn.functional.linear(x, x, x[0]).sum().backward()


def anonymous_bytes() -> int:
    """Resident memory of this process that is of no file, such as tensors; a file's mapped pages are not in it."""
    return _status("RssAnon")


class AnonymousPeak:
    """The most anonymous memory while a block runs, looked at every few milliseconds from a thread of its own.

    The kernel keeps a high-water mark only of all resident memory, in which mapped files are.

    Attributes:
        bytes: the most that was seen.
    """

    def __init__(self, seconds: float = 0.002) -> None:
        self.bytes = 0
        self._seconds = seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self.bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, anonymous_bytes())

    def _watch(self) -> None:
        while not self._end.wait(self._seconds):
            self._look()


def _peak_on_cuda(prepare: Callable[[], Callable[[], None]], device: torch.device) -> int:
    work = prepare()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _measure_and_exit(prepare: Callable[[], Callable[[], None]], writing: int) -> None:
    code = 1
    try:
        work = prepare()
        gc.collect()
        return_free_heap()
        _CLEAR.write_text("5")
        before = _status("VmRSS")
        work()
        os.write(writing, str(_status("VmHWM") - before).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: the parent's handlers and buffers are not the child's to run and flush.
        os._exit(code)


def return_free_heap() -> None:
    """Give the system back what the C library keeps of freed memory.

    It would stay resident and be used again unseen, and a peak be read too low.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
