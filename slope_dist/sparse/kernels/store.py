"""A file of choices, so that what was measured once is measured once: JSON, for one card and its libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from slope_dist.errors import UserError

FORMAT = 1
LARGEST_FILE = 2**26


class ChoiceStore:
    """Choices by what they are for, under the name of the setting that they were measured in.

    One file holds several settings (cards, versions); a choice of another setting is never taken.

    Args:
        path: of the file, which need not exist.
        hint: what to do where it cannot be read or written.

    Raises:
        UserError: if it holds something else.
    """

    def __init__(self, path: Path, *, hint: str = "") -> None:
        self.path = path
        self._hint = f"; {hint}" if hint else ""
        self._read()

    def choices(self, setting: str) -> dict[str, dict[str, Any]]:
        """What was chosen in a setting: plain data by key."""
        return dict(self._read().get(setting, {}))

    def add(self, setting: str, choices: dict[str, dict[str, Any]]) -> None:
        """Write choices, with what others have written meanwhile.

        Raises:
            UserError: if the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            everything = self._read()
            everything[setting] = everything.get(setting, {}) | choices
            # Of a name of its own: processes of other machines may share the folder, and process numbers.
            temporary = self.path.with_name(f"{self.path.name}.{uuid4().hex}")
            try:
                temporary.write_text(json.dumps({"format": FORMAT, "settings": everything}, indent=1) + "\n")
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path}: choices of kernels cannot be written: {error.strerror or error}{self._hint}"
            ) from error

    def _read(self) -> dict[str, dict[str, dict[str, Any]]]:
        try:
            with self.path.open("rb") as file:
                data = file.read(LARGEST_FILE)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(
                f"{self.path}: choices of kernels cannot be read: {error.strerror or error}{self._hint}"
            ) from error
        try:
            content = json.loads(data)
            settings = content["settings"]
            good = content["format"] == FORMAT and all(
                _is_choice(choice) for choices in settings.values() for choice in choices.values()
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            good = False
        if not good:
            raise UserError(f"{self.path} is no file of kernel choices of format {FORMAT}; remove it to measure anew")
        return settings


def _is_choice(choice: Any) -> bool:
    """Whether this is what `Choice.as_data` makes."""
    times = {**choice["seconds"], "dense": choice["dense_seconds"]}
    return (
        isinstance(choice["label"], str)
        and choice["label"] in choice["seconds"]
        and all(isinstance(seconds, float | int) and seconds >= 0 for seconds in times.values())
        and all(isinstance(reason, str) for reason in choice["rejected"].values())
    )
