"""Lets this process be watched: its heart, and on each machine the process that listens to the hearts there.

What fails here costs one line of warning, and the run goes on without.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

import slope_dist
from slope_dist.config.watch import WatchConfig
from slope_dist.lines import listen_on_any_port
from slope_dist.output import tell
from slope_dist.parallel.environment import Environment
from slope_dist.parallel.flight import collectives_begun, last_collectives
from slope_dist.training.watchdog import REQUESTS
from slope_dist.watching.heartbeat import Heart

_NODES = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")
"""Where deepspeed, torchrun and srun say which node this is."""

_LEADER = "slope_dist/watch/leader"
_MEETING = timedelta(seconds=60)
"""How long the ranks of a machine may take to come here, one after the other."""


class Watch:
    """This rank under watch. Every rank makes one when the process group exists.

    Args:
        config: the timeouts.
        environment: this process among the others.
        folder: the run folder; nothing is written to it before `own_folder`.
        command: that goes on with this run, for a message.
    """

    def __init__(self, config: WatchConfig, environment: Environment, folder: Path, command: str) -> None:
        self._environment = environment
        self._heart: Heart | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        if config.hang_timeout is None:
            return
        try:
            self._heart = Heart(collectives_begun, last_collectives, self._look_after_it)
        except (OSError, AttributeError, RuntimeError) as error:
            # Another system than Linux, or no room for three files and a thread.
            self._warn(f"hangs of rank {environment.rank} are not found: {error}")
        try:
            self._start(config, folder, command)
        except (OSError, RuntimeError, ValueError) as error:
            self._warn(f"hangs are not found on {socket.gethostname()}: no watchdog could be started ({error})")

    def own_folder(self) -> None:
        """The run folder is this run's: reports may be written there."""
        if self._heart is not None:
            self._heart.own_folder()

    def close(self) -> None:
        """No more watching; harmless to call again."""
        if self._heart is not None:
            self._heart.close()
            self._heart = None
        if self._watchdog is not None:
            watchdog, self._watchdog = self._watchdog, None
            assert watchdog.stdin is not None
            with contextlib.suppress(OSError), watchdog.stdin as told:
                # That this rank has left.
                told.write(b"\n")
            with contextlib.suppress(subprocess.TimeoutExpired):
                # It waits for the other ranks of the machine, which end about now.
                watchdog.wait(timeout=1.0)

    def _start(self, config: WatchConfig, folder: Path, command: str) -> None:
        """Leave this rank's address, and start the watchdog if this is the machine's first rank."""
        mine, store = self._environment, dist.distributed_c10d._get_default_store()
        keys = [f"slope_dist/watch/{machine()}/{local}" for local in range(mine.local_world_size)]
        address = None if self._heart is None else self._heart.address
        # Whatever fails on a rank, the others are not to wait for its word.
        store.set(keys[mine.local_rank], json.dumps([mine.rank, address]))
        if mine.local_rank > 0:
            return
        listener = None
        if mine.rank == 0 and mine.world_size > mine.local_world_size:
            leader = None
            try:
                listener = listen_on_any_port(mine.world_size)
                hosts = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
                leader = {"hosts": [host for host in dict.fromkeys(hosts) if host], "port": listener.getsockname()[1]}
                leader["token"] = secrets.token_hex(16)
            finally:
                store.set(_LEADER, json.dumps(leader))
        store.wait(keys, _MEETING)
        found = dict(json.loads(store.get(key)) for key in keys)
        addresses = {rank: address for rank, address in found.items() if address is not None}
        leader = None if mine.world_size == mine.local_world_size else json.loads(store.get(_LEADER))
        settings: dict[str, Any] = {
            "host": socket.gethostname(),
            "world_size": mine.world_size,
            "usual": config.hang_timeout,
            "start": config.first_step_timeout,
            "addresses": addresses,
            "listener": None if listener is None else listener.fileno(),
            "token": "" if leader is None else leader.pop("token"),
            "leader": None if listener is not None else leader,
            "folder": str(folder.absolute()),
            "command": command,
        }
        try:
            if addresses:
                self._watchdog = _spawn(settings, () if listener is None else (listener.fileno(),))
        finally:
            if listener is not None:
                listener.close()

    def _look_after_it(self) -> None:
        if self._watchdog is not None and self._watchdog.poll() is not None:
            code = self._watchdog.returncode
            self._watchdog = None
            if code == 0:
                # That of rank 0 has seen the run's end.
                return
            self._warn(f"the watchdog of {socket.gethostname()} has ended ({code}): hangs are not found any more")

    def _warn(self, text: str) -> None:
        tell(f"warning: {text}", sys.stderr)


def machine() -> str:
    """A name that ranks share which can look into each other's processes.

    Launchers number their nodes: hosts may have one name, and so may two nodes of a launcher that are one host.
    """
    node = next((os.environ[name] for name in _NODES if name in os.environ), "")
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')} {node}"


def _spawn(settings: dict[str, Any], files: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Start the program. It holds nothing of the rank's but its error stream."""
    packages = str(Path(slope_dist.__file__).parents[1])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        watchdog = subprocess.Popen(
            # Without the site's packages: it needs none, and they take longer to be found than it takes to start.
            [sys.executable, "-S", "-m", "slope_dist.training.watchdog"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": packages},
            pass_fds=files,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert watchdog.stdin is not None
    watchdog.stdin.write(json.dumps(settings).encode() + b"\n")
    watchdog.stdin.flush()
    return watchdog
