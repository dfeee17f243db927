"""The process beside the ranks of a machine: it sees whether they get on, and ends the run when none does.

There is one on each machine. All but that of rank 0 tell it every moment what their ranks show, over a connection that
carries seconds and counts but no times of day: clocks of machines differ. That of rank 0 decides; it then lets all look
into their ranks, says which is late, and lets all kill theirs. One that has lost it, or hears nothing of it for as long
as a hang takes, judges its own ranks alone.

It counts only seconds in which it ran itself, so that a job that was suspended as a whole does not hang.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from slope_dist.lines import Line
from slope_dist.watching.judgement import Limits, find_late, hangs
from slope_dist.watching.machine import ANSWER, Evidence, Machine, Seen
from slope_dist.watching.report import Report

_LONGEST = 2**26
_CONNECT = 10.0
_CONCLUDE = 10.0
"""Seconds that the report may take to be written: the disk may be why the run hangs."""

_KILLED = 2.0


@dataclass(frozen=True)
class Settings:
    """What a watchdog is told at its start.

    Attributes:
        host: its machine.
        world_size: ranks of the run.
        usual, start: see `Limits`.
        addresses: of the machine's ranks, see `Heart.address`.
        listener: file descriptor on which that of rank 0 is called; None elsewhere.
        leader: "hosts" and "port" where it is called; None on its machine.
        token: that callers know.
    """

    host: str
    world_size: int
    usual: float
    start: float
    addresses: dict[int, dict[str, Any]]
    listener: int | None
    leader: dict[str, Any] | None
    token: str


class Watchdog:
    """One of them.

    Args:
        settings: what it is told.
        conclude: writes a report down; only that of rank 0 is asked to, and one that has lost it.
    """

    def __init__(self, settings: Settings, conclude: Callable[[Report, bool], None]) -> None:
        self._settings = settings
        self._conclude = conclude
        self._limits = Limits(settings.usual, settings.start)
        self._interval = max(0.05, min(1.0, settings.usual / 20))
        self._machine = Machine(settings.host, settings.addresses)
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._line: Line | None = None
        # Seconds since that of rank 0 has said anything.
        self._silent = 0.0
        self._lines: dict[socket.socket, Line] = {}
        # Of other machines: how their ranks were seen, and when they said so.
        self._told: dict[socket.socket, tuple[list[Seen], float]] = {}
        self._ran = 0.0
        self._found: dict[socket.socket, list[Evidence]] = {}
        self._killed: set[socket.socket] = set()
        # A rank has left, or gone: look now.
        self._hurry = False

    def run(self) -> None:
        """Watch until the machine's ranks have left, or ended."""
        for rank, reason in self._machine.unseen.items():
            _warn(f"rank {rank} is not watched: its process cannot be looked into ({reason})")
        self._connect()
        for watched in self._machine.ranks.values():
            self._selector.register(watched.end, selectors.EVENT_READ, watched)
        # What started this process writes there when it has left.
        self._selector.register(0, selectors.EVENT_READ, self._woken)
        last = time.monotonic()
        while self._machine.watched():
            # Not at each message: of a thousand machines there are as many a second.
            self._until(lambda: self._hurry, self._interval)
            self._hurry = False
            now = time.monotonic()
            # What is beyond was not watched: this process was stopped, or its machine asleep.
            ran = min(now - last, 2 * self._interval)
            self._ran += ran
            self._machine.look(ran)
            last = now
            seen = self._machine.seen()
            self._silent += ran
            if self._line is not None and self._silent > self._limits.usual:
                # Its machine stands still, and a connection to it does not show that.
                _warn(
                    f"the watchdog of {self._settings.host} has heard nothing of that of rank 0 for "
                    f"{self._silent:.0f} s: it judges its own ranks alone"
                )
                self._let_go(self._line.socket)
            if self._line is not None:
                self._line.send({"kind": "seen", "ranks": [one.to_json() for one in seen]})
            elif hangs(everyone := seen + self._others(self._ran), self._limits):
                self._end_run(everyone)
                return
        if not any(rank.gone and not rank.seen.sign.left for rank in self._machine.ranks.values()):
            # Where ranks have died here, those of other machines are still to be watched.
            self._tell_all({"kind": "bye"})

    def _connect(self) -> None:
        settings = self._settings
        if settings.listener is not None:
            self._listener = socket.socket(fileno=settings.listener)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        elif settings.leader is not None:
            for host in settings.leader["hosts"]:
                try:
                    connection = socket.create_connection((host, settings.leader["port"]), timeout=_CONNECT)
                except OSError:
                    continue
                self._line = Line(connection, _LONGEST)
                self._line.send({"kind": "hello", "token": settings.token})
                self._selector.register(connection, selectors.EVENT_READ, self._obey)
                return
            _warn(
                f"the watchdog of {settings.host} cannot reach that of rank 0 on port {settings.leader['port']} of "
                f"{' or '.join(settings.leader['hosts'])}: it judges its own ranks alone"
            )

    def _serve(self, seconds: float) -> None:
        """Do what has come in, for at most so long where nothing comes."""
        for key, _ in self._selector.select(seconds):
            if callable(key.data):
                key.data(key.fileobj)
            else:
                # It may have left in the meantime.
                key.data.look(0.0)
                key.data.gone = self._hurry = True
                self._selector.unregister(key.fileobj)

    def _woken(self, stdin: int) -> None:
        os.read(stdin, 1)
        self._hurry = True
        self._selector.unregister(stdin)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.settimeout(_CONNECT)
        self._lines[connection] = Line(connection, _LONGEST)
        self._selector.register(connection, selectors.EVENT_READ, self._hear)

    def _hear(self, connection: socket.socket) -> None:
        """What another machine's watchdog says, to that of rank 0."""
        try:
            for message in self._lines[connection].arrived():
                self._take(connection, message)
        except (OSError, ValueError, KeyError, TypeError):
            # Its ranks have ended, or its machine has: Peers say so where it is not the end of the run.
            self._selector.unregister(connection)
            self._lines.pop(connection).socket.close()
            self._told.pop(connection, None)

    def _take(self, connection: socket.socket, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "hello":
            if not secrets.compare_digest(message["token"], self._settings.token):
                raise ValueError("not one of ours")
            self._told[connection] = [], self._ran
        elif connection not in self._told:
            raise ValueError("not one of ours")
        elif kind == "seen":
            self._told[connection] = [Seen.from_json(seen) for seen in message["ranks"]], self._ran
            self._lines[connection].send({"kind": "heard"})
        elif kind == "evidence":
            self._found[connection] = [Evidence.from_json(one) for one in message["ranks"]]
        elif kind == "killed":
            self._killed.add(connection)

    def _obey(self, connection: socket.socket) -> None:
        """What the watchdog of rank 0 says, to another."""
        assert self._line is not None
        try:
            for message in self._line.arrived():
                self._silent = 0.0
                if message["kind"] == "look":
                    found = self._machine.evidence()
                    self._machine.freeze()
                    self._line.send({"kind": "evidence", "ranks": [one.to_json() for one in found]})
                elif message["kind"] == "kill":
                    self._machine.kill()
                    self._line.send({"kind": "killed"})
                elif message["kind"] == "bye":
                    raise SystemExit(0)
        except (OSError, ValueError):
            # Without a rank 0 the run ends, by the word of its peers; if it does not, somebody must still watch.
            self._let_go(connection)

    def _let_go(self, connection: socket.socket) -> None:
        """Of the watchdog of rank 0."""
        self._selector.unregister(connection)
        connection.close()
        self._line = None

    def _others(self, now: float) -> list[Seen]:
        """The ranks of other machines, as they were seen so long ago."""
        return [
            replace(seen, quiet=seen.quiet + now - when, mute=seen.mute + now - when)
            for ranks, when in self._told.values()
            for seen in ranks
            if now - when > 2 * self._interval
        ] + [seen for ranks, when in self._told.values() for seen in ranks if now - when <= 2 * self._interval]

    def _end_run(self, everyone: list[Seen]) -> None:
        """Find out who is late, say it, write it down, and kill all ranks."""
        try:
            self._tell_all({"kind": "look"})
            found = self._machine.evidence()
            self._machine.freeze()
            self._until(lambda: len(self._found) >= len(self._told), 2 * ANSWER + 1)
            found = sorted(
                [*found, *(one for ranks in self._found.values() for one in ranks)], key=lambda one: one.seen.rank
            )
            quiet = max(min(seen.quiet for seen in everyone), *(seen.mute for seen in everyone))
            limit = min(self._limits.of(seen) for seen in everyone)
            report = Report(quiet, limit, find_late(found, self._settings.world_size), found)
            print(f"error: {report.cause()}", file=sys.stderr, flush=True)
            owned = any(seen.sign.owned for seen in everyone)
            writing = threading.Thread(target=self._conclude, args=(report, owned), daemon=True)
            writing.start()
            writing.join(_CONCLUDE)
            if writing.is_alive():
                _warn(f"the report could not be written within {_CONCLUDE:.0f} s")
        finally:
            # The others first: while rank 0 is stopped, none of them says that another was lost.
            self._tell_all({"kind": "kill"})
            self._until(lambda: len(self._killed) >= len(self._told), _KILLED)
            self._machine.kill()

    def _tell_all(self, message: dict[str, Any]) -> None:
        for connection in list(self._told):
            self._lines[connection].send(message)

    def _until(self, done: Callable[[], bool], seconds: float) -> None:
        """Do what comes in until it is done, for at most so long."""
        end = time.monotonic() + seconds
        while not done() and (left := end - time.monotonic()) > 0:
            self._serve(left)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
