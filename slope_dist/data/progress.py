"""What is told on stderr while a corpus is prepared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PLAIN_LINE_SECONDS = 5.0


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done, of `total`, with MB/s on stderr: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        with _progress_bar(title, total) as advance_bar:
            yield advance_bar
        return
    start = said = time.monotonic()
    done = 0

    def line() -> str:
        speed = done / 1e6 / max(time.monotonic() - start, 1e-9)
        share = f"{100 * done / total:.0f} %, " if total else ""
        return f"{title}: {share}{done / 1e6:.1f} MB, {speed:.1f} MB/s"

    def advance(num_bytes: int) -> None:
        nonlocal done, said
        done += num_bytes
        if time.monotonic() - said >= _PLAIN_LINE_SECONDS:
            said = time.monotonic()
            say(line())

    yield advance
    say(line())


@contextmanager
def _progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda num_bytes: bar.advance(task, num_bytes)
