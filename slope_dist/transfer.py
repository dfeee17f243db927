"""Long transfers, in words: sizes, durations, and a line now and then on how far one has come."""

from __future__ import annotations

import time
from collections.abc import Callable

from slope_dist.watching.heartbeat import beat

QUIET_SECONDS = 3.0
"""A transfer says nothing before it has taken this long, and then again each time as long has passed."""


def size_text(size: float) -> str:
    """Bytes for people: "1.2 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def count_text(count: float) -> str:
    """A number for people: "12,288"."""
    return f"{count:,.0f}"


def duration_text(seconds: float) -> str:
    """Seconds for people: "3m12s"."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Transfer:
    """Bytes on their way to or from a disk, or other units of a long work.

    Args:
        what: such as "saving step 12".
        say: called with a line; None for silence.
        text: writes a number of the units.
        quiet: see `QUIET_SECONDS`.
        clock: seconds.
    """

    def __init__(
        self,
        what: str = "",
        say: Callable[[str], None] | None = None,
        *,
        text: Callable[[float], str] = size_text,
        quiet: float = QUIET_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._say = say
        self._text = text
        self._quiet = quiet
        self._clock = clock
        self.begin(0)

    def begin(self, total: int) -> None:
        """From here on, so many units."""
        self._total = total
        self._done = 0
        self._start = self._said = self._clock()

    def add(self, size: int) -> None:
        """So many more have passed."""
        beat()
        self._done += size
        now = self._clock()
        if self._say is None or now - self._said < self._quiet:
            return
        self._said = now
        rate = self._done / (now - self._start)
        left = max(0, self._total - self._done) / rate
        self._say(
            f"{self._what}: {self._text(self._done)} of {self._text(self._total)}, "
            f"{self._text(rate)}/s, {duration_text(left)} left"
        )
