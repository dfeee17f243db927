"""A rank's signs of life: one page of memory without a name, which the kernel frees with its last user.

Writing to it is a store to memory; reading it asks nothing of its owner, which may be stopped. Fields of one number are
written whole on the machines that this runs on; text may be torn, and is only shown.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

SIZE = mmap.PAGESIZE

_SIGN = struct.Struct("<QqQBB")
_BESIDE, _PULSE, _ASKED, _ANSWERED, _FLAGS = 40, 48, 64, 72, 80
_TEXT, _TEXT_SIZE = 128, 120
_NUMBER = struct.Struct("<Q")
_TWO = struct.Struct("<Qq")


@dataclass(frozen=True)
class Sign:
    """What a rank shows at a moment.

    Attributes:
        marks: counts what the main thread has begun or got on with.
        step: the optimizer step it is in, from 1; before the first one, the last one done.
        place: counts marks within the step, alike on all ranks.
        long: whether what it does may take as long as a run's start.
        beside: counts what other threads got on with.
        pulses: counts while Python runs.
        collectives: number of collectives begun in the default group; -1: not known.
        owned: whether the run folder is known to be this run's.
        left: whether it needs no watching any more.
        doing: in words.
    """

    marks: int
    step: int
    place: int
    long: bool
    beside: int
    pulses: int
    collectives: int
    owned: bool
    left: bool
    doing: str


class Record:
    """The page, mapped from an open file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, SIZE)

    @classmethod
    def create(cls) -> tuple[int, Record]:
        """A new page and its descriptor."""
        descriptor = os.memfd_create("slope-watch")
        os.ftruncate(descriptor, SIZE)
        return descriptor, cls(descriptor)

    def read(self) -> Sign:
        """What it shows now."""
        marks, step, place, long, _ = _SIGN.unpack_from(self._page, 0)
        pulses, collectives = _TWO.unpack_from(self._page, _PULSE)
        text = self._page[_TEXT : _TEXT + _TEXT_SIZE].rstrip(b"\0").decode(errors="replace")
        (beside,) = _NUMBER.unpack_from(self._page, _BESIDE)
        owned, left = self._page[_FLAGS], self._page[_FLAGS + 1]
        return Sign(marks, step, place, bool(long), beside, pulses, collectives, bool(owned), bool(left), text)

    def mark(self, marks: int, step: int, place: int, long: bool) -> None:
        """The main thread has got on."""
        _SIGN.pack_into(self._page, 0, marks, step, place, long, 0)

    def say(self, doing: str) -> None:
        """What it does."""
        data = doing.encode()[:_TEXT_SIZE]
        self._page[_TEXT : _TEXT + _TEXT_SIZE] = data.ljust(_TEXT_SIZE, b"\0")

    def mark_beside(self, count: int) -> None:
        """Another thread has got on."""
        _NUMBER.pack_into(self._page, _BESIDE, count)

    def pulse(self, count: int, collectives: int) -> None:
        """Python runs."""
        _TWO.pack_into(self._page, _PULSE, count, collectives)

    def own(self) -> None:
        """The run folder is this run's."""
        self._page[_FLAGS] = 1

    def leave(self) -> None:
        """No more watching."""
        self._page[_FLAGS + 1] = 1

    @property
    def asked(self) -> int:
        """How often the rank was asked for its collectives."""
        return int(_NUMBER.unpack_from(self._page, _ASKED)[0])

    @asked.setter
    def asked(self, count: int) -> None:
        _NUMBER.pack_into(self._page, _ASKED, count)

    @property
    def answered(self) -> int:
        """The last of those questions that it has answered."""
        return int(_NUMBER.unpack_from(self._page, _ANSWERED)[0])

    @answered.setter
    def answered(self, count: int) -> None:
        _NUMBER.pack_into(self._page, _ANSWERED, count)

    def close(self) -> None:
        """Unmap it."""
        self._page.close()
