"""A rank that dies ends the others, and the first line of error says which one and why.

Each rank holds one TCP connection to rank 0, on which nothing passes while all is well. The system closes a process's
connections however it ends, so one that closes without a goodbye is a death, known at once and without help from the
collectives: NCCL's wait for a dead peer, gloo's do so while a group is made. Rank 0 decides why the run ends (the first
cause wins) and tells every rank; one that is still held in a collective `GRACE` seconds later ends itself.

    a rank raises                 it says so before it leaves; the others end within `GRACE` seconds
    a rank is killed or crashes   its connection closes; as above
    rank 0 is killed              every rank's connection closes; as above, and one rank a machine says so
    a machine or its network is   TCP probes go unanswered for about 20 s; then as a killed rank (on systems with
    gone without a word           Linux's socket options; elsewhere after the collectives' own timeout)
    a rank hangs but lives        not noticed here, but from outside: see watching/
    before the process group is   not noticed here. The launchers see the exit code: deepspeed's and torchrun's end the
    there                         others of the run, srun's does with --kill-on-bad-exit

A rank that cannot reach rank 0 on this connection says so, and relies on its collectives and its launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from slope_dist.lines import Line, listen_on_any_port
from slope_dist.output import tell
from slope_dist.parallel.environment import Environment

GRACE = 3.0
"""Seconds a rank has to leave by itself once the run is known to end: to say its own cause, or finish a rename."""

EXIT_LOST = 1
"""Exit code of a rank that ends because another did."""

_KEY = "slope_dist/failure"
_ANSWER = 5.0
_CONNECT = 10.0
_PARTING = 30.0
# Before a verdict, how long rank 0 waits for a report that explains this one. A lost rank: more may have died with it.
# A cause that all ranks share: rank 0 says it. A broken connection: somebody's death, which will be heard of.
_WAIT = {"lost": 0.05, "shared": 1.0, "broken": 2.0}

# What gloo, NCCL and the store say when it is the other end that failed.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "failed to recv, got 0 bytes",
    "Timed out waiting",
    "timed out after",
    "remote process exited",
    "ncclRemoteError",
)


@dataclass(frozen=True)
class Verdict:
    """Why a run ends.

    Attributes:
        ranks: those it ends for.
        cause: the rank's own words; None where it had none, and was lost.
    """

    ranks: tuple[int, ...]
    cause: str | None

    def lost_line(self) -> str:
        """What is said of ranks that could not say it themselves."""
        who = ", ".join(map(str, self.ranks))
        if len(self.ranks) == 1:
            return f"rank {who} was lost (killed, or its machine failed): the others lost their connection to it"
        return f"ranks {who} were lost (killed, or their machines failed): the others lost their connections to them"


def in_words(error: BaseException) -> str:
    """An exception in one line: its class, the first line of its text, and where it was raised."""
    text = next(iter(str(error).splitlines()), "")
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if not frames:
        return said
    # Where our code called a library says more than where the library gave up.
    name, line = next((frame for frame in reversed(frames) if "site-packages" not in frame[0]), frames[-1])
    path = Path(name)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{said} ({shown}:{line})"


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception says only that another rank is gone."""
    root = error
    # What was raised while the first error was handled, or in its place, comes from that error.
    while (before := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
        root = before
    # An OSError of that text would be about a file or a socket of ours.
    return isinstance(root, RuntimeError) and any(text in str(root) for text in _LOST_PEER)


class Peers:
    """The other ranks, as far as their ends go. One in a process, made when the process group exists.

    With one rank, and where rank 0 cannot be reached, it only repeats what it is told.

    Args:
        environment: this process among the others.
        last_words: called, with the cause, for what to say below the line on a lost rank; "" for nothing.
    """

    def __init__(self, environment: Environment, last_words: Callable[[str], str]) -> None:
        self._rank = environment.rank
        # When rank 0 is gone: not all, and not only a rank that died with rank 0's machine.
        self._speaks_for_rank_0 = environment.local_rank == 0 or environment.rank == 1
        self._last_words = last_words
        self._verdict: Verdict | None = None
        self._known = threading.Event()
        self._left = threading.Event()
        self._code = EXIT_LOST
        self._hub: _Hub | None = None
        self._line: Line | None = None
        if environment.world_size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        if self._rank == 0:
            self._hub = _Hub(environment.world_size)
            self._hub.start()
            store.set(_KEY, json.dumps(self._hub.address))
        address = json.loads(store.get(_KEY))
        self._line = _call(self._rank, address)
        if self._line is None:
            tell(
                f"warning: rank {self._rank} cannot reach rank 0 on port {address['port']} of "
                f"{' or '.join(address['hosts'])}: a rank that dies may end the others late, or by the launcher alone",
                sys.stderr,
            )
            return
        threading.Thread(target=self._listen, name="peers", daemon=True).start()
        if self._hub is not None:
            # A rank 0 that died before the others have called would leave them without a word.
            self._hub.all_called.wait(_CONNECT)

    def fail(self, cause: str, *, shared: bool) -> bool:
        """Report this rank's own end.

        Args:
            cause: why, in one line.
            shared: whether all ranks are likely to end with the same cause; rank 0 then says it.

        Returns:
            Whether this rank should say its cause: False if another has the same one to say.
        """
        verdict = self._report("shared" if shared else "failed", cause)
        return verdict is None or verdict.ranks == (self._rank,) or verdict.cause != cause

    def lose(self, cause: str) -> bool:
        """Report that a collective of this rank lost another; whether one has failed, which is or will be said.

        Returns:
            False if no rank is known to have failed: what looked like another's end is this rank's own error.
        """
        verdict = self._report("broken", cause)
        return verdict is not None and verdict != Verdict((self._rank,), cause)

    @property
    def is_to_blame(self) -> bool:
        """Whether the run ends for this rank's report, as far as is known."""
        return self._verdict is None or self._verdict.ranks == (self._rank,)

    def part(self) -> None:
        """Say goodbye at the end of a run that went well. Rank 0 waits a while, so that it leaves last."""
        self._left.set()
        if self._line is not None:
            self._line.send({"kind": "part"})
        if self._hub is not None:
            # One that never called will not say goodbye either.
            self._hub.join(_PARTING if self._hub.all_called.is_set() else GRACE)

    def leave(self, code: int) -> int:
        """Let go of the process group after a failure; returns `code`, or ends the process with it."""
        self._code = code
        if dist.is_initialized():
            if dist.get_world_size() > 1 and dist.get_backend() == "nccl":
                # A communicator with a dead rank cannot be destroyed, nor left to the interpreter's end: both wait.
                self._end()
            dist.destroy_process_group()
        self._left.set()
        return code

    def _report(self, kind: str, cause: str) -> Verdict | None:
        if self._line is None:
            return None
        # If rank 0 is gone, the listener learns it by itself.
        self._line.send({"kind": kind, "cause": cause})
        self._known.wait(_ANSWER)
        return self._verdict

    def _listen(self) -> None:
        """Wait for the verdict, say it where that is for this rank to do, and see that the process ends."""
        assert self._line is not None
        message = self._line.next()
        if message is None:
            verdict, speaks = Verdict((0,), None), self._speaks_for_rank_0
        else:
            verdict, speaks = Verdict(tuple(message["ranks"]), message["cause"]), self._rank == 0
        if self._left.is_set():
            return
        # Before this rank's main thread may say anything, and before a launcher that has seen the death ends this rank.
        if speaks and verdict.cause is None:
            lines = [f"error: {verdict.lost_line()}"]
            # A disk that is full, or a reader of stderr that is gone, must not keep this rank from ending.
            with contextlib.suppress(Exception):
                lines.append(self._last_words(verdict.lost_line()))
            with contextlib.suppress(Exception):
                print("\n".join(line for line in lines if line), file=sys.stderr, flush=True)
        self._verdict = verdict
        self._known.set()
        if not self._left.wait(GRACE):
            self._end()

    def _end(self) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(self._code)


def _call(rank: int, address: dict[str, Any]) -> Line | None:
    """A connection to rank 0 on which it has answered."""
    for host in ["localhost"] if rank == 0 else address["hosts"]:
        try:
            line = Line(socket.create_connection((host, address["port"]), timeout=_CONNECT))
        except OSError:
            continue
        line.send({"kind": "hello", "rank": rank, "token": address["token"]})
        # On another machine than rank 0's, someone else may listen on that port.
        if line.next() == {"kind": "welcome", "token": address["token"]}:
            line.socket.settimeout(None)
            return line
        line.socket.close()
    return None


@dataclass(frozen=True)
class _Report:
    rank: int
    kind: str
    cause: str | None
    due: float


class _Hub(threading.Thread):
    """Rank 0's other part: hears of every rank's end and decides once why the run ends."""

    def __init__(self, world_size: int) -> None:
        super().__init__(name="peers hub", daemon=True)
        self._world_size = world_size
        self.all_called = threading.Event()
        self._listener = listen_on_any_port(world_size)
        self._lines: dict[socket.socket, Line] = {}
        self._ranks: dict[socket.socket, int] = {}
        self._gone: set[int] = set()
        self._reports: list[_Report] = []
        self._verdict: Verdict | None = None
        hosts = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
        self.address: dict[str, Any] = {
            "port": self._listener.getsockname()[1],
            "hosts": [host for host in dict.fromkeys(hosts) if host],
            # A stranger who finds the port cannot end the run.
            "token": secrets.token_hex(16),
        }

    def run(self) -> None:
        """Serve until every rank has gone, one way or the other."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while len(self._gone) < self._world_size:
                for key, _ in selector.select(self._patience()):
                    assert isinstance(key.fileobj, socket.socket)
                    if key.fileobj is self._listener:
                        # A caller that has gone already, or one too many, must not end the watch over the others.
                        with contextlib.suppress(OSError):
                            connection, _ = self._listener.accept()
                            self._lines[connection] = Line(connection)
                            selector.register(connection, selectors.EVENT_READ)
                    elif not self._hear(key.fileobj):
                        selector.unregister(key.fileobj)
                        self._lines.pop(key.fileobj).socket.close()
                        self._ranks.pop(key.fileobj, None)
                if self._patience() == 0.0:
                    self._verdict = self._decide()
                    # Rank 0 last: once it knows it may leave, and this thread with it.
                    for connection in sorted(self._ranks, key=self._ranks.__getitem__, reverse=True):
                        self._tell(self._lines[connection])
        self._listener.close()

    def _patience(self) -> float | None:
        """Seconds until a verdict is due; None while there is nothing to decide."""
        if self._verdict is not None or not self._reports:
            return None
        return max(0.0, min(report.due for report in self._reports) - time.monotonic())

    def _hear(self, connection: socket.socket) -> bool:
        """Take in what has arrived from one end; False when it is gone."""
        try:
            for message in self._lines[connection].arrived():
                self._take(connection, message)
        except (OSError, ValueError, KeyError, TypeError):
            rank = self._ranks.get(connection)
            if rank is not None and rank not in self._gone:
                self._gone.add(rank)
                self._note(rank, "lost", None)
            return False
        return True

    def _take(self, connection: socket.socket, message: dict[str, Any]) -> None:
        line = self._lines[connection]
        if connection not in self._ranks:
            if not secrets.compare_digest(message["token"], self.address["token"]):
                raise ValueError("not one of ours")
            self._ranks[connection] = int(message["rank"])
            line.send({"kind": "welcome", "token": self.address["token"]})
            if len(self._ranks) == self._world_size:
                self.all_called.set()
            if self._verdict is not None:
                self._tell(line)
        elif message["kind"] == "part":
            self._gone.add(self._ranks[connection])
        else:
            self._note(self._ranks[connection], message["kind"], message["cause"])

    def _note(self, rank: int, kind: str, cause: str | None) -> None:
        wait = 0.0 if (rank, kind) == (0, "shared") else _WAIT.get(kind, 0.0)
        self._reports.append(_Report(rank, kind, cause, time.monotonic() + wait))

    def _decide(self) -> Verdict:
        """What was reported first, except that a broken connection is no cause while there is another."""
        reports = [report for report in self._reports if report.kind != "broken"] or self._reports
        first = reports[0]
        if first.kind == "lost":
            return Verdict(tuple(sorted({report.rank for report in reports if report.kind == "lost"})), None)
        if first.kind == "shared":
            first = next((report for report in reports if (report.rank, report.kind) == (0, "shared")), first)
        return Verdict((first.rank,), first.cause)

    def _tell(self, line: Line) -> None:
        assert self._verdict is not None
        line.send({"ranks": self._verdict.ranks, "cause": self._verdict.cause})
