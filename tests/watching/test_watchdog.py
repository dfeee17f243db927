"""Claim: the watchdog ends a run in which nobody gets on, over several machines too, and says which rank is late;
it leaves with its ranks, does not hear requests to stop, and takes no job that was suspended as a whole for a hang.

Run: pytest tests/watching/test_watchdog.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from slope_dist.lines import listen_on_any_port
from slope_dist.training.watchdog import REQUESTS
from tests.distributed import ROOT
from tests.watching.hearts import heart

USUAL = 2.5


@contextmanager
def watchdog(folder: Path, addresses: dict[int, Any], **told: Any) -> Iterator[subprocess.Popen[str]]:
    listener = told.get("listener")
    settings = {"host": "node1", "world_size": len(addresses), "usual": USUAL, "start": 60.0, "addresses": addresses}
    settings |= {"listener": None, "leader": None, "token": "", "folder": str(folder), "command": "go on"} | told
    # As a rank starts it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    process = subprocess.Popen(
        [sys.executable, "-S", "-m", "slope_dist.training.watchdog"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        pass_fds=() if listener is None else (listener,),
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.stdin is not None
    process.stdin.write(json.dumps(settings) + "\n")
    process.stdin.flush()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> str:
    """What it said, when it has ended."""
    text = process.communicate(timeout=20)[1]
    assert process.returncode == 0, text
    return text


def until_it_watches(process: subprocess.Popen[str]) -> None:
    """On a busy machine it takes a while to start."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        # A file may be closed while it is looked at.
        with suppress(OSError):
            if any("pidfd" in os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()):
                return
        time.sleep(0.02)
    raise AssertionError


Process = subprocess.Popen[str]


@contextmanager
def two_watched(folder: Path, *does: str, owned: bool = False) -> Iterator[tuple[Process, Process, list[Process]]]:
    """The watchdogs of two machines, of which the first is rank 0's, and their ranks, which do the named things."""
    with ExitStack() as stack, listen_on_any_port(2) as listener:
        ranks = [stack.enter_context(heart(one, owned=owned)) for one in does]
        leader = {"hosts": ["127.0.0.1"], "port": listener.getsockname()[1]}
        told = {"world_size": 2, "token": "secret"}
        first = stack.enter_context(watchdog(folder, {0: ranks[0][1]}, listener=listener.fileno(), **told))
        second = stack.enter_context(watchdog(folder, {1: ranks[1][1]}, host="node2", leader=leader, **told))
        for watching in (first, second):
            until_it_watches(watching)
        yield first, second, [process for process, _ in ranks]


def test_it_imports_no_torch() -> None:
    code = "import sys, slope_dist.training.watchdog; print('torch' in sys.modules, 'numpy' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert said.stdout == b"False False\n"


def test_a_hang_is_reported_and_ended(tmp_path: Path) -> None:
    with (
        heart("stand_still", owned=True) as (process, address),
        watchdog(tmp_path, {0: address}) as watching,
    ):
        text = ended(watching)
        assert process.wait(timeout=5) == -signal.SIGKILL
    first, second, third = text.splitlines()
    assert f": rank 0 (node1, process {process.pid}) is late at step 5, in its work: it is in no collective" in first
    folder = Path(second.removeprefix("the Python stacks of all ranks are in "))
    assert "stand_still" in (folder / "rank-00000.stacks.txt").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert (report["late"], report["step"], report["ranks"][0]["doing"]) == ([0], 5, "its work")
    assert third == "there is no checkpoint yet; start again with: go on"
    end = json.loads((tmp_path / "end.json").read_text())
    assert (end["how"], end["exit_code"], f"error: {end['cause']}") == ("failed", 137, first)


def test_a_folder_that_may_be_anothers_stays_as_it_is(tmp_path: Path) -> None:
    with heart("stand_still") as (_, address), watchdog(tmp_path, {0: address}) as watching:
        assert "stand_still" in ended(watching)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    folder.write_text("a file")
    with heart("stand_still", owned=True) as (process, address), watchdog(folder, {0: address}) as watching:
        text = ended(watching)
        assert process.wait(timeout=5) == -signal.SIGKILL
    assert "the stacks cannot be written" in text and "stand_still" in text and "Traceback" not in text


def test_two_machines(tmp_path: Path) -> None:
    """That of rank 0 decides, and names a rank of the other; all ranks end, and only it speaks."""
    with ExitStack() as stack, listen_on_any_port(2) as listener:
        ranks = [
            stack.enter_context(heart(does, owned=rank == 0)) for rank, does in enumerate(("get_on", "stand_still"))
        ]
        leader = {"hosts": ["127.0.0.1"], "port": listener.getsockname()[1]}
        first = stack.enter_context(
            watchdog(tmp_path, {0: ranks[0][1]}, world_size=2, listener=listener.fileno(), token="secret")
        )
        second = stack.enter_context(
            watchdog(tmp_path, {1: ranks[1][1]}, world_size=2, host="node2", leader=leader, token="secret")
        )
        # While rank 0 gets on there is no hang; who calls without the token is not heard.
        with socket.create_connection(("127.0.0.1", leader["port"])) as stranger:
            stranger.sendall(b'{"kind": "hello", "token": "guess"}\n')
            assert stranger.recv(1) == b""
        time.sleep(2 * USUAL)
        assert first.poll() is None and second.poll() is None
        ranks[0][0].send_signal(signal.SIGSTOP)
        texts = ended(first), ended(second)
        assert [process.wait(timeout=5) for process, _ in ranks] == [-signal.SIGKILL] * 2
    assert "rank 0 (node1" in texts[0].splitlines()[0] and "is stopped" in texts[0].splitlines()[0]
    assert texts[1] == ""
    (folder,) = (tmp_path / "watch").iterdir()
    assert "get_on" in (folder / "rank-00000.stacks.txt").read_text()
    assert "stand_still" in (folder / "rank-00001.stacks.txt").read_text()


def test_one_that_lost_rank_0s_judges_alone(tmp_path: Path) -> None:
    with (
        heart("stand_still", owned=True) as (process, address),
        watchdog(tmp_path, {1: address}, world_size=2, leader={"hosts": ["127.0.0.1"], "port": 1}) as watching,
    ):
        text = ended(watching)
        assert process.wait(timeout=5) == -signal.SIGKILL
    assert "cannot reach that of rank 0" in text.splitlines()[0] and "rank 1 (node1" in text


def test_so_does_one_that_hears_nothing_of_rank_0s(tmp_path: Path) -> None:
    """A machine that stands still as a whole keeps its connections, and its watchdog sees nothing."""
    with two_watched(tmp_path, "get_on", "stand_still", owned=True) as (first, second, ranks):
        time.sleep(2 * USUAL)
        assert second.poll() is None, "while rank 0's gets on it is heard"
        for process in (first, ranks[0]):
            process.send_signal(signal.SIGSTOP)
        text = ended(second)
        assert ranks[1].wait(timeout=5) == -signal.SIGKILL
    assert "has heard nothing of that of rank 0 for" in text.splitlines()[0] and "rank 1 (node2" in text


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_it_leaves_with_its_ranks_and_not_before(tmp_path: Path, name: str) -> None:
    with heart("get_on") as (process, address), watchdog(tmp_path, {0: address}) as watching:
        until_it_watches(watching)
        watching.send_signal(getattr(signal, name))
        time.sleep(0.2)
        assert watching.poll() is None
        process.kill()
        process.wait()
        assert ended(watching) == ""


@pytest.mark.slow  # Its one machine is a part of the next test's two.
def test_a_suspended_job_does_not_hang(tmp_path: Path) -> None:
    with heart("get_on") as (process, address), watchdog(tmp_path, {0: address}) as watching:
        until_it_watches(watching)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            watching.send_signal(number)
            process.send_signal(number)
            time.sleep(2 * USUAL)
        assert watching.poll() is None and process.poll() is None


def test_nor_does_one_of_two_machines(tmp_path: Path) -> None:
    """What rank 0's watchdog knows of the other machine does not get old while it is stopped itself."""
    with two_watched(tmp_path, "get_on", "get_on") as (first, second, ranks):
        time.sleep(1.0)
        job = [first, second, *ranks]
        # Resumed in the order in which it may see the oldest news.
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in job:
                process.send_signal(number)
            time.sleep(2 * USUAL)
        assert [process.poll() for process in job] == [None] * 4
