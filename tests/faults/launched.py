"""The same trials end to end: their ranks are started by the `deepspeed` command, not forked from a warm process.

Each rank runs this file, which calls the trial's function in the place of launch/pretrain.py and leaves behind its
process id, what it has written and how it ended: the launcher mixes the ranks' output and makes one exit code of all.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from slope_dist.lines import port_to_meet_at
from tests.distributed import Outcome

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 200.0
UNREPORTED = -signal.SIGKILL
"""The exit code of a rank that left none behind."""


def end_launched(
    function: Callable[..., Any], ranks: int, *arguments: Any, process_group: bool = False
) -> list[Outcome]:
    """As `tests.distributed.end_ranks`, for ranks that deepspeed starts; a single one too. No results come back."""
    assert not process_group, "the program makes its own"
    with tempfile.TemporaryDirectory(prefix="launched-") as scratch:
        folder = Path(scratch)
        call = [function.__module__, function.__qualname__, json.dumps(arguments), str(folder)]
        environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
        programs = Path(sys.executable).parent
        environment |= {"PATH": f"{programs}:{environment['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        port = str(port_to_meet_at())
        with (folder / "launcher").open("wb") as said:
            launcher = subprocess.Popen(
                [str(programs / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, __file__, *call],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait(launcher, folder, ranks)
        finally:
            # Whatever is left is of this launcher's session.
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if os.getsid(process.pid) == launcher.pid:
                        process.kill()
            launcher.wait()
        return [_outcome(folder, rank) for rank in range(ranks)]


def _wait(launcher: subprocess.Popen[bytes], folder: Path, ranks: int) -> None:
    """Until the launcher has ended and every rank that it started."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        ids = [folder / f"{rank}.pid" for rank in range(ranks)]
        started = [int(path.read_text()) for path in ids if path.exists()]
        if launcher.poll() is not None and not any(_runs(process) for process in started):
            return
        time.sleep(0.05)
    raise AssertionError(f"still running after {TIMEOUT:.0f} s: {(folder / 'launcher').read_text()[-2000:]}")


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _outcome(folder: Path, rank: int) -> Outcome:
    def text(name: str) -> str:
        path = folder / f"{rank}.{name}"
        return path.read_text(errors="replace") if path.exists() else ""

    if not (folder / f"{rank}.pid").exists():
        raise AssertionError(f"rank {rank} never started: {(folder / 'launcher').read_text()[-2000:]}")
    return Outcome(int(text("code") or UNREPORTED), None, text("out"), text("err"))


def _be_a_rank(module: str, name: str, arguments: str, folder: str) -> None:
    """What a rank does; its files appear whole."""
    mine = Path(folder) / os.environ["RANK"]
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(mine.with_name(f"{mine.name}.{kind}"), os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    _leave(mine, "pid", os.getpid())
    code = 70
    try:
        getattr(importlib.import_module(module), name)(*json.loads(arguments))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else code
    except BaseException:
        traceback.print_exc()
    _leave(mine, "code", code)
    raise SystemExit(code)


def _leave(mine: Path, kind: str, number: int) -> None:
    part = mine.with_name(f"{mine.name}.{kind}.part")
    part.write_text(str(number))
    part.rename(mine.with_name(f"{mine.name}.{kind}"))


if __name__ == "__main__":
    # deepspeed puts --local_rank before the script's own arguments.
    _be_a_rank(*[word for word in sys.argv[1:] if not word.startswith("--local_rank")])
