"""Short messages between processes of a run, over TCP: known at once to be lost when either end dies."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from typing import Any

# Seconds without a sign before the first probe, between probes, and how many may go unanswered.
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}


class Line:
    """One end of a connection: JSON objects, one a line of text.

    Args:
        connection: that end.
        longest: bytes of a message; who sends more is cut off.
    """

    def __init__(self, connection: socket.socket, longest: int = 2**20) -> None:
        self.socket = connection
        self._longest = longest
        self._pending = b""
        self._ready: list[dict[str, Any]] = []
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """Send, if anyone is there; that nobody is, the reading side notices."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def next(self) -> dict[str, Any] | None:
        """Wait for the next message; None when the other end is gone, or late where the socket has a timeout."""
        try:
            while not self._ready:
                self._receive()
        except (OSError, ValueError):
            return None
        return self._ready.pop(0)

    def arrived(self) -> list[dict[str, Any]]:
        """The messages that are whole after one reading.

        Raises:
            OSError: if the other end is gone.
            ValueError: if what it sends are no messages.
        """
        self._receive()
        ready, self._ready = self._ready, []
        return ready

    def _receive(self) -> None:
        data = self.socket.recv(4096)
        if not data:
            raise ConnectionError
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > self._longest:
            raise ValueError("a message without end")
        self._ready += [json.loads(line) for line in lines]


def listen_on_any_port(backlog: int) -> socket.socket:
    """A socket that waits for callers, over IPv4 and, where there is one, IPv6."""
    if socket.has_dualstack_ipv6():
        # IPv6 may be built in and switched off.
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def port_to_meet_at() -> int:
    """A port that is free now, for ranks that meet at it when they have started.

    One that the system picks could be given out again before they listen; of these it gives out none by itself, as
    Linux and others are set up (`net.ipv4.ip_local_port_range`).
    """
    ports = range(10000, 30000)
    # Not from `random`, whose state processes forked from one another share.
    first = secrets.randbelow(len(ports))
    for port in (*ports[first:], *ports[:first]):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port
    raise OSError(f"no port from {ports.start} to {ports.stop - 1} is free")
