"""What people read of a program: on one line, without obeying what it shows, whether or not there is room for it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def visible(text: str) -> str:
    """The text on one line, with escapes such as `\\x1b` for all that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def tell(text: str, file: TextIO | None = None) -> None:
    """Print, as far as there is room: a log on a full disk, or one that nobody reads, must not end what it tells of."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


def settle_output() -> None:
    """Flush what `tell` could not, or drop it: at exit its failure would take the place of the exit code."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        drop_output()


def drop_output() -> None:
    """Let what is printed from here on, and what is still buffered, go nowhere: it must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
