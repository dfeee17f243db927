"""A file of choices, so that what was measured once is measured once: JSON, for one card and its libraries."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from slope_dist.errors import UserError
from slope_dist.sparse.kernels.failures import CRASHED

FORMAT = 1
LARGEST_FILE = 2**26

Content = dict[str, dict[str, dict[str, Any]]]
"""By setting: "settings" has the choices by what they are for, "crashed" why candidates are never tried again, by the
same and their names, and "findings" what trials of the device told, by library."""

PARTS = ("settings", "crashed", "findings")


class ChoiceStore:
    """Choices by what they are for, under the name of the setting that they were measured in.

    One file holds several settings (cards, versions); a choice of another setting is never taken. A candidate that is
    being tried has a mark beside the file, which the system holds locked as long as the process lives: a mark that is
    found with nobody behind it tells of a candidate that crashed or hung, which is noted when the file is opened.

    Args:
        path: of the file, which need not exist.
        hint: what to do where it cannot be read or written.
        alone: nobody else uses the file now, on whatever machine, so that every mark is of a process that is gone.
            Otherwise those of other machines are left alone: not every file system shares its locks with them.

    Raises:
        UserError: if it holds something else.
    """

    def __init__(self, path: Path, *, hint: str = "", alone: bool = False) -> None:
        self.path = path
        self._hint = f"; {hint}" if hint else ""
        self._read()
        self._judge(alone)

    def choices(self, setting: str) -> dict[str, dict[str, Any]]:
        """What was chosen in a setting: plain data by key."""
        return dict(self._read()["settings"].get(setting, {}))

    def add(self, setting: str, choices: dict[str, dict[str, Any]]) -> None:
        """Write choices, with what others have written meanwhile.

        Raises:
            UserError: if the file cannot be written.
        """
        self._change(lambda content: content["settings"].setdefault(setting, {}).update(choices))

    def crashed(self, setting: str) -> dict[str, dict[str, str]]:
        """Why candidates are never tried again: by key, then by name."""
        return dict(self._read()["crashed"].get(setting, {}))

    def reject(self, setting: str, key: str, label: str, reason: str) -> None:
        """Note that a candidate is never to be tried again.

        Raises:
            UserError: if the file cannot be written.
        """

        def note(content: Content) -> None:
            content["crashed"].setdefault(setting, {}).setdefault(key, {})[label] = reason

        self._change(note)

    def findings(self, setting: str) -> dict[str, dict[str, bool]]:
        """What trials of the device told, by library."""
        return dict(self._read()["findings"].get(setting, {}))

    def add_findings(self, setting: str, findings: dict[str, dict[str, bool | None]]) -> None:
        """Keep what trials told, if it is new.

        Raises:
            UserError: if the file cannot be written.
        """
        known = self.findings(setting)
        told = {
            library: {name: answer for name, answer in answers.items() if answer is not None}
            for library, answers in findings.items()
        }
        new = {library: answers for library, answers in told.items() if answers and answers != known.get(library)}
        if new:
            self._change(lambda content: content["findings"].setdefault(setting, {}).update(new))

    @contextlib.contextmanager
    def trying(self, setting: str, key: str, label: str) -> Iterator[None]:
        """Mark a candidate as being tried inside the block.

        Raises:
            UserError: if the mark cannot be written.
        """
        mark = self.path.with_name(f"{self.path.name}.trying.{uuid4().hex}")
        hidden = mark.with_name(f".{mark.name}")
        with contextlib.ExitStack() as stack:
            with self._writing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(hidden.open("w"))
                for name in (hidden, mark):
                    stack.callback(name.unlink, missing_ok=True)
                _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                host, when = socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")
                json.dump({"setting": setting, "key": key, "label": label, "host": host, "time": when}, file)
                file.flush()
                # Locked before anybody can see it.
                hidden.replace(mark)
            yield

    def _judge(self, alone: bool) -> None:
        """Note as crashed what is marked by processes that are gone."""
        for mark in sorted(self.path.parent.glob(f"{self.path.name}.trying.*")):
            # One that another process judges at the same time is gone in between.
            with self._writing(), contextlib.suppress(FileNotFoundError), mark.open() as file:
                free = _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    tried = json.loads(file.read(LARGEST_FILE))
                    setting, key, label, host, when = (
                        str(tried[name]) for name in ("setting", "key", "label", "host", "time")
                    )
                except (ValueError, TypeError, KeyError):
                    # Cut short, as on a disk that was full.
                    mark.unlink()
                    continue
                if free is False or not (alone or (free and host == socket.gethostname())):
                    continue
                self.reject(setting, key, label, f"{CRASHED} or hung when it was tried, on {host} at {when}")
                mark.unlink()

    def _change(self, change: Callable[[Content], object]) -> None:
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Held while the file is read and replaced, or what another process writes in between would be lost.
            with self.path.with_name(f"{self.path.name}.lock").open("a") as lock:
                _lock(lock.fileno(), fcntl.LOCK_EX)
                content = self._read()
                change(content)
                # Of a name of its own: where there are no locks, processes of other machines may share the folder.
                temporary = self.path.with_name(f"{self.path.name}.{uuid4().hex}")
                try:
                    temporary.write_text(json.dumps({"format": FORMAT, **content}, indent=1) + "\n")
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: choices of kernels cannot be written: {error.strerror or error}{self._hint}"
            ) from error

    def _read(self) -> Content:
        try:
            with self.path.open("rb") as file:
                data = file.read(LARGEST_FILE)
        except FileNotFoundError:
            return {part: {} for part in PARTS}
        except OSError as error:
            raise UserError(
                f"{self.path}: choices of kernels cannot be read: {error.strerror or error}{self._hint}"
            ) from error
        try:
            content = json.loads(data)
            parts = {part: content["settings"] if part == "settings" else content.get(part, {}) for part in PARTS}
            good = content["format"] == FORMAT and all(
                IS_GOOD[part](entry) for part in PARTS for entries in parts[part].values() for entry in entries.values()
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            good = False
        if not good:
            raise UserError(f"{self.path} is no file of kernel choices of format {FORMAT}; remove it to measure anew")
        return parts


def _lock(descriptor: int, how: int) -> bool | None:
    """Lock a file: whether it is ours now; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_choice(choice: Any) -> bool:
    """Whether this is what `Choice.as_data` makes."""
    times = {**choice["seconds"], "dense": choice["dense_seconds"]}
    return (
        isinstance(choice["label"], str)
        and choice["label"] in choice["seconds"]
        and all(isinstance(seconds, float | int) and seconds >= 0 for seconds in times.values())
        and all(isinstance(reason, str) for reason in choice["rejected"].values())
    )


IS_GOOD: dict[str, Callable[[Any], bool]] = {
    "settings": _is_choice,
    "crashed": lambda reasons: all(isinstance(reason, str) for reason in reasons.values()),
    "findings": lambda told: all(isinstance(answer, bool) for answer in told.values()),
}
"""Whether an entry of a part is what this module writes."""
