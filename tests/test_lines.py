"""Claim: ranks are told to meet at a port that is free and that no connection is given meanwhile, by Linux's defaults.

Alone: .venv/bin/pytest tests/test_lines.py
"""

from __future__ import annotations

import socket

import pytest

from slope_dist import lines

LINUX_GIVES_OUT = 32768
"""The first of the ports that it picks by itself, unless told otherwise."""


def test_ports_are_free_and_not_those_that_the_system_gives_out() -> None:
    ports = {lines.port_to_meet_at() for _ in range(100)}
    assert len(ports) > 90, "two runs that start at once would choose alike"
    for port in ports:
        with socket.socket() as free:
            free.bind(("", port))
    assert max(ports) < LINUX_GIVES_OUT


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lines.port_to_meet_at()
    monkeypatch.setattr(lines.secrets, "randbelow", lambda _: first - 10000)
    with socket.socket() as other:
        other.bind(("", first))
        assert lines.port_to_meet_at() != first
