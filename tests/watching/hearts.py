"""Processes with a heart and nothing else, for the tests of what watches them: they start in a tenth of a second."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.distributed import ROOT

_PROGRAM = """
import ctypes, json, os, subprocess, sys, time
from slope_dist.watching import heartbeat
from slope_dist.watching.heartbeat import Heart, begin_step, doing

def get_on():
    for step in range(1, 10**6):
        begin_step(step)
        time.sleep(0.05)

def stand_still():
    time.sleep(600)

def hold_the_lock():
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    print("locked", flush=True)
    library.pthread_mutex_lock(mutex)

def start_another():
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, flush=True)
    time.sleep(600)

heart = Heart(lambda: 7, lambda: [{"group": "0", "number": 7, "name": "gloo:all_reduce", "sizes": [[1]],
                                   "ended": True, "thread": 1}], lambda: None)
print(json.dumps(heart.address), flush=True)
begin_step(1)
begin_step(int(sys.argv[2]))
if sys.argv[3] == "owned":
    heart.own_folder()
with doing("its work"):
    # The first time might take long.
    pass
with doing("its work"):
    getattr(sys.modules["__main__"], sys.argv[1])()
"""


@contextmanager
def heart(does: str, step: int = 5, owned: bool = False) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process that is in `step` and does the named thing; it, and its heart's address."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _PROGRAM, does, str(step), "owned" if owned else "not"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
