"""The ranks of one machine, as the process beside them sees them: their signs, how long these have stood still, their
stacks and collectives when a hang is looked into, and their end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slope_dist.watching.heartbeat import SIGNAL
from slope_dist.watching.record import Record, Sign

ANSWER = 1.0
"""Seconds that ranks have to write their stacks, and to tell their collectives."""

_LIBRARY = ctypes.CDLL(None) if hasattr(ctypes.CDLL(None), "tgkill") else None
_SETTLED = 0.1
_LOOK_EVERY = 0.02
_STOPPED = ("T", "t")
"""Of /proc/<pid>/stat: stopped by a signal, or by a debugger."""


@dataclass(frozen=True)
class Seen:
    """A rank as it was seen last.

    Attributes:
        rank, host, process: who it is.
        sign: what it shows.
        quiet: seconds for which it has got on with nothing.
        mute: seconds for which its Python has not run.
    """

    rank: int
    host: str
    process: int
    sign: Sign
    quiet: float
    mute: float

    def to_json(self) -> dict[str, Any]:
        """As a message holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Seen:
        """The same again."""
        return cls(**message | {"sign": Sign(**message["sign"])})


@dataclass(frozen=True)
class Evidence:
    """What was found out about a rank of a run that hangs.

    Attributes:
        seen: how it was seen last.
        state: of its main thread, a letter as in /proc/<pid>/stat; "" if it has gone.
        stacks: Python's, of all threads, as faulthandler writes them; "" if the rank could not be made to.
        main: the number of its main thread in those.
        collectives: see parallel/flight.py; None if it did not answer.
    """

    seen: Seen
    state: str
    stacks: str
    main: int
    collectives: list[dict[str, Any]] | None

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped from outside."""
        return self.state in _STOPPED

    def to_json(self) -> dict[str, Any]:
        """As a message holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Evidence:
        """The same again."""
        return cls(**message | {"seen": Seen.from_json(message["seen"])})


class WatchedRank:
    """One of them.

    Args:
        rank: its number.
        host: this machine.
        address: see `Heart.address`.

    Raises:
        OSError: if it has gone, or is not to be looked into, as one of another user.
    """

    def __init__(self, rank: int, host: str, address: dict[str, Any]) -> None:
        self.process = int(address["pid"])
        # Readable when the process has ended; and its number cannot be another's by then.
        try:
            self.end = os.pidfd_open(self.process)
        except AttributeError:
            # A Python that was built with an old system's headers.
            raise OSError(errno.ENOSYS, "this Python has no pidfd_open") from None
        opened = [os.open(f"/proc/{self.process}/fd/{address[name]}", flags) for name, flags in _FILES]
        record, self._stacks, self._trace = opened
        self._record = Record(record)
        os.close(record)
        self._main = int(address["main"])
        self.seen = Seen(rank, host, self.process, self._record.read(), 0.0, 0.0)
        self.gone = False

    def look(self, seconds: float) -> None:
        """See it again, so many seconds later."""
        sign, before = self._record.read(), self.seen.sign
        # Others' work counts where the main thread waits for it.
        still = sign.marks == before.marks and (not sign.long or sign.beside == before.beside)
        self.seen = replace(
            self.seen,
            sign=sign,
            quiet=self.seen.quiet + seconds if still else 0.0,
            mute=self.seen.mute + seconds if sign.pulses == before.pulses else 0.0,
        )

    @property
    def is_watched(self) -> bool:
        """Whether it still has a part in the run."""
        return not self.gone and not self.seen.sign.left

    def ask(self) -> None:
        """Let it write its stacks, and tell its collectives when it can."""
        self._record.asked += 1
        if _LIBRARY is None or self.gone:
            self.send(SIGNAL)
        else:
            # To the main thread: one that is stopped writes where it was before it goes on.
            _LIBRARY.tgkill(self.process, self.process, int(SIGNAL))

    @property
    def has_answered(self) -> bool:
        """Whether it has told its collectives."""
        return self._record.answered == self._record.asked

    def stacks(self) -> str:
        """What it has written of them so far."""
        return os.pread(self._stacks, 2**22, 0).decode(errors="replace")

    def evidence(self, state: str) -> Evidence:
        """What it has written and told."""
        collectives = None
        if self.has_answered:
            with contextlib.suppress(ValueError):
                collectives = json.loads(os.pread(self._trace, 2**22, 0))
        return Evidence(self.seen, state, self.stacks(), self._main, collectives)

    def state(self) -> str:
        """See `Evidence.state`."""
        try:
            text = Path(f"/proc/{self.process}/task/{self.process}/stat").read_text()
        except OSError:
            return ""
        # The name in parentheses may hold anything.
        return text.rpartition(")")[2].split()[0]

    def send(self, number: int) -> None:
        """Send it a signal, if it is there."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.end, number)


_FILES = (("record", os.O_RDWR), ("stacks", os.O_RDONLY), ("trace", os.O_RDONLY))


class Machine:
    """All of them.

    Args:
        host: its name.
        addresses: of its ranks, see `Heart.address`.

    Attributes:
        unseen: why ranks cannot be watched, by rank.
    """

    def __init__(self, host: str, addresses: dict[int, dict[str, Any]]) -> None:
        self.ranks: dict[int, WatchedRank] = {}
        self.unseen: dict[int, str] = {}
        for rank, address in addresses.items():
            try:
                self.ranks[rank] = WatchedRank(rank, host, address)
            except (ProcessLookupError, FileNotFoundError):
                # It has ended or closed its heart: a run that is refused may be over before this process has started.
                continue
            except OSError as error:
                self.unseen[rank] = error.strerror or str(error)

    def look(self, seconds: float) -> None:
        """See all again, so many seconds later."""
        for rank in self.ranks.values():
            rank.look(seconds)

    def watched(self) -> list[WatchedRank]:
        """Those with a part in the run."""
        return [rank for rank in self.ranks.values() if rank.is_watched]

    def seen(self) -> list[Seen]:
        """How those were seen last."""
        return [rank.seen for rank in self.watched()]

    def evidence(self) -> list[Evidence]:
        """Let each write its stacks and tell its collectives; takes up to twice `ANSWER` seconds."""
        ranks = self.watched()
        states = {rank.process: rank.state() for rank in ranks}
        asleep = [rank for rank in ranks if states[rank.process] in _STOPPED]
        awake = [rank for rank in ranks if rank not in asleep]
        # Those that are stopped come last: once they run the others may get on, and would tell of other places.
        for some in (awake, asleep):
            for rank in some:
                rank.ask()
                rank.send(signal.SIGCONT)
            _wait_for(some)
        return [rank.evidence(states[rank.process]) for rank in ranks]

    def freeze(self) -> None:
        """Stop all ranks, so that none says that another was lost."""
        for rank in self.ranks.values():
            rank.send(signal.SIGSTOP)

    def kill(self) -> None:
        """End all ranks and what they have started, but for this process."""
        self.freeze()
        children = [child for rank in self.ranks.values() if not rank.gone for child in _descendants(rank.process)]
        for rank in self.ranks.values():
            rank.send(signal.SIGKILL)
        for child in children:
            if child != os.getpid():
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGKILL)


def _wait_for(ranks: list[WatchedRank]) -> None:
    """Until all have answered, and nothing more is written."""
    end = time.monotonic() + ANSWER
    written, since = -1, time.monotonic()
    while ranks and time.monotonic() < end:
        time.sleep(_LOOK_EVERY)
        texts = [rank.stacks() for rank in ranks]
        size = sum(map(len, texts))
        if size != written:
            written, since = size, time.monotonic()
        elif all(texts) and all(r.has_answered for r in ranks) and time.monotonic() - since > _SETTLED:
            return


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found
