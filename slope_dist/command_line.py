"""Command lines whose mistakes get one line, as everything else a user can put right."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from slope_dist.errors import EXIT_BAD_INPUT, UserError

EXIT_INTERRUPTED = 130
"""What shells report for a program that Ctrl-C ended."""


def path_argument(text: str) -> Path:
    """The path that an option names; not "", which is what a shell makes of a variable that is not set.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path (a shell variable may not be set)")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` where argparse would print its usage and exit."""

    def __init__(self, description: str | None = None, **keywords: Any) -> None:
        # Also what argparse makes subcommands' parsers with, so what it gives goes first.
        ours: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **(ours | keywords))

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise UserError(f"{message}; see {self.prog} --help")


def visible(text: str) -> str:
    """The text on one line, with escapes such as `\\x1b` for all that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def answer(work: Callable[[], object]) -> int:
    """Do the work of a program that writes nothing but its output, and return its exit code.

    A `UserError`, an output without room and Ctrl-C are one line on stderr; a reader of the output that leaves is
    nothing to speak of.
    """
    try:
        work()
        # What is buffered would fail at exit, where nobody answers.
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does.
        drop_output()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        drop_output()
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


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
