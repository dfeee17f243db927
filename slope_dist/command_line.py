"""Command lines whose mistakes get one line, as everything else a user can put right."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from slope_dist.errors import EXIT_BAD_INPUT, UserError
from slope_dist.output import drop_output, visible

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
