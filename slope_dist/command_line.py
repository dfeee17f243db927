"""Command lines whose mistakes get one line, as everything else a user can put right."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from slope_dist.errors import UserError

EXIT_INTERRUPTED = 130
"""What shells report for a program that Ctrl-C ended."""


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
