"""Runs a test's function on several ranks, each a real process with a real process group.

The processes are forked from a child of pytest that has imported everything slow once and has started no thread, so a
case costs about a second. Requests and results travel as JSON and safetensors; functions are found again by module and
name, so they must be at the top level of their file. The backend is what the product chooses: nccl where there are
GPUs (a case that wants more ranks than there are GPUs is skipped), gloo otherwise.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slope_dist.lines import port_to_meet_at

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120.0
GRACE = 20.0
"""Seconds that the other ranks are given to end by themselves once one has failed.

On a busy machine that takes more than the 3 s that slope_dist gives a rank in a collective. test_failure.py relies on a
rank that overstays this being killed and seen so: it is to be less than the time after which its stuck rank wakes.
"""

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID")
_CODE_RAISED = 70
_TENSOR = "__tensor__"


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        code: exit code, negative for a signal; 70 after an exception.
        result: what the function returned, None if it did not.
        output: its standard output.
        errors: its standard error.
    """

    code: int
    result: Any
    output: str
    errors: str


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What `function(*arguments)` returns on each of `world_size` ranks, in rank order.

    Arguments are JSON; the result may also hold tensors. The process group exists when the function is called.

    Raises:
        AssertionError: if a rank fails or is slower than `timeout` seconds; all are killed then, and its traceback is
            in the text.
    """
    outcomes = end_ranks(function, world_size, *arguments, timeout=timeout)
    bad = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.code != 0]
    # A rank killed because another failed says nothing of the reason.
    bad.sort(key=lambda item: item[1].code == -signal.SIGKILL)
    if bad:
        texts = [
            f"rank {rank} of {world_size} ended with code {outcome.code}\n"
            f"{outcome.output[-2000:]}{outcome.errors[-6000:]}"
            for rank, outcome in bad
        ]
        raise AssertionError("\n".join(texts))
    return [outcome.result for outcome in outcomes]


def end_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = TIMEOUT,
    process_group: bool = True,
) -> list[Outcome]:
    """As `run_ranks`, for functions that are meant to fail or to be killed: how each rank ended.

    With `process_group` False only the launcher's environment variables are set, and none for a single rank.
    """
    skip_without_gpus(world_size)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        request = {
            "module": function.__module__,
            "name": function.__qualname__,
            "world_size": world_size,
            "arguments": arguments,
            "folder": folder,
            "timeout": timeout,
            "process_group": process_group,
        }
        codes = _server().ask(request)
        return [
            Outcome(
                code,
                _read_result(Path(folder), rank),
                (Path(folder) / f"{rank}.out").read_text(errors="replace"),
                (Path(folder) / f"{rank}.err").read_text(errors="replace"),
            )
            for rank, code in enumerate(codes)
        ]


def skip_without_gpus(world_size: int) -> None:
    """Skip where there are GPUs but not one for each rank: nccl wants that."""
    import pytest
    import torch

    if 0 < torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} ranks need {world_size} GPUs, {torch.cuda.device_count()} are there")


class Server:
    """The warm process, as pytest sees it."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
        # Asking NVML how many GPUs there are leaves CUDA usable after a fork; asking CUDA would not.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"PYTHONPATH": path, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"} | dict.fromkeys(_ONE_THREAD, "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> list[int]:
        """Send a request and wait for the exit codes of its ranks."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise AssertionError(f"the process that forks ranks ended with code {self._process.wait()}")
        return json.loads(reply)

    def close(self) -> None:
        """End it, and with it the ranks that still run."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        # It still waits for ranks, which would outlive it if it were killed at once.
        for end in (self._process.terminate, self._process.kill):
            if self._process.poll() is None:
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10)


@cache
def _server() -> Server:
    return Server()


def _serve() -> None:
    """Import what ranks need, then fork them on request."""
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    # Whatever an import prints must not be taken for a reply.
    os.dup2(2, 1)
    _warm_up()
    # So that ranks are killed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for line in requests:
        request = SimpleNamespace(**json.loads(line))
        codes = _fork_ranks(request, [requests.fileno(), replies.fileno()])
        replies.write(json.dumps(codes) + "\n")
        replies.flush()
    # Some libraries say at the end which of their objects were never freed.
    gc.unfreeze()


def _warm_up() -> None:
    import torch

    torch.set_num_threads(1)
    import sentencepiece  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import slope_dist.training.trainer  # noqa: F401
    from slope_dist.data.prepare import megatron_indexed_dataset
    from slope_dist.engine.deepspeed_engine import import_deepspeed
    from slope_dist.training.plot import plot_losses

    import_deepspeed()
    megatron_indexed_dataset()
    with tempfile.TemporaryDirectory() as folder:
        # The first picture of a process takes a third of a second longer than others: fonts are looked for.
        plot_losses([{"step": 1, "loss": 1.0, "phase": "sparse"}], Path(folder) / "loss.png", "")
    status = Path("/proc/self/status")
    if status.exists():
        threads = next(line for line in status.read_text().splitlines() if line.startswith("Threads:"))
        assert threads.split()[1] == "1", f"forking is safe with one thread only: {threads}"
    # Else each collection in a rank walks all that was imported here, and so copies its pages.
    gc.collect()
    gc.freeze()


def _fork_ranks(request: SimpleNamespace, close: list[int]) -> list[int]:
    port = port_to_meet_at()
    running: dict[int, int] = {}
    codes = [0] * request.world_size
    try:
        for rank in range(request.world_size):
            process = os.fork()
            if process == 0:
                _run_rank(request, rank, port, close)
            running[process] = rank
        deadline = time.monotonic() + request.timeout
        while running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                code = os.waitstatus_to_exitcode(status)
                codes[running.pop(process)] = code
                if code != 0:
                    deadline = min(deadline, time.monotonic() + GRACE)
            elif time.monotonic() > deadline:
                _kill(running)
                deadline = float("inf")
            else:
                time.sleep(0.005)
    finally:
        _kill(running)
    return codes


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


def _run_rank(request: SimpleNamespace, rank: int, port: int, close: list[int]) -> None:
    """The life of a forked process; it does not return."""
    code = _CODE_RAISED
    folder = Path(request.folder)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor in close:
            os.close(descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
        _call(request, rank, port)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else _CODE_RAISED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(request: SimpleNamespace, rank: int, port: int) -> None:
    if request.process_group or request.world_size > 1:
        size = str(request.world_size)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function: Any = importlib.import_module(request.module)
    for name in request.name.split("."):
        function = getattr(function, name)
    if request.process_group:
        from slope_dist.parallel import environment

        environment.start(environment.discover(), threads=1)
        _write_result(Path(request.folder), rank, function(*request.arguments))
        environment.stop()
    else:
        _write_result(Path(request.folder), rank, function(*request.arguments))


def _write_result(folder: Path, rank: int, result: Any) -> None:
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().clone().contiguous()
            return {_TENSOR: str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    text = json.dumps(plain(result))
    save_file(tensors, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(text)


def _read_result(folder: Path, rank: int) -> Any:
    from safetensors.torch import load

    path = folder / f"{rank}.json"
    if not path.exists():
        return None
    tensors = load((folder / f"{rank}.safetensors").read_bytes())
    return json.loads(
        path.read_text(), object_hook=lambda value: tensors[value[_TENSOR]] if set(value) == {_TENSOR} else value
    )


if __name__ == "__main__":
    # The module under its own name, so that tests and server speak of the same functions.
    importlib.import_module("tests.distributed")._serve()
