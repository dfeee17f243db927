"""Ranks that a benchmark starts itself, on the CPU of this machine."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from slope_dist.benchmark import machine
from slope_dist.lines import port_to_meet_at


class RankFailedError(RuntimeError):
    """A rank failed or was too slow; its last words are in the text."""


def run(command: Sequence[str], count: int, folder: Path, timeout: float) -> None:
    """Run the command as `count` ranks, with a launcher's variables; each writes to `folder`/<rank>.log.

    Raises:
        RankFailedError: if one fails or all are slower than `timeout` seconds; its errors are in the text.
    """
    port = port_to_meet_at()
    running = []
    for rank in range(count):
        variables = {"RANK": str(rank), "WORLD_SIZE": str(count)}
        variables |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        path = os.pathsep.join([str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / f"{rank}.log").open("w") as log:
            running.append(
                subprocess.Popen(
                    command,
                    env=os.environ | variables | {"PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
    _wait(running, folder, timeout)


def _wait(running: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    """Until all have ended; the first that fails, or the time that is up, ends the others."""
    deadline, late = time.monotonic() + timeout, False
    try:
        while any(process.poll() is None for process in running):
            failed = [rank for rank, process in enumerate(running) if process.poll()]
            late = time.monotonic() > deadline
            if failed or late:
                break
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
        codes = [process.wait() for process in running]
    if late:
        ends = "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(len(codes)))
        raise RankFailedError(f"not done within {timeout:.0f} s:\n{ends}")
    for rank, code in enumerate(codes):
        # Those that were ended here say nothing of the reason.
        if code > 0 or (code < 0 and not any(other > 0 for other in codes)):
            raise RankFailedError(
                f"rank {rank} ended with code {code}:\n{(folder / f'{rank}.log').read_text()[-4000:]}"
            )
