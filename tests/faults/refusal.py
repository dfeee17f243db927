"""What every refusal of a checkpoint must be: one line that names it, and the one before is found instead."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from slope_dist.checkpoint import Checkpoint, CheckpointError, find_newest

MAX_LINE = 1500

_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What ends a line, moves a terminal's cursor, or cannot be written at all."""


def line_of(error: Exception) -> str | None:
    """What is wrong with the text of an error that a user is meant to see; None where it is one short line."""
    text = str(error)
    if not text or _BREAKS.search(text):
        return f"the error is not one clean line: {text!r:.200}"
    return f"the error has {len(text)} characters: {text[:200]}" if len(text) > MAX_LINE else None


def wrongly_judged(
    checkpoints: Path, spoilt: str, names: Collection[str], found_step: int | None, said: Collection[str] = ()
) -> str | None:
    """What is wrong with how a spoilt checkpoint is met; None if it is refused as it should be.

    Opening it must raise one line that names its folder, one of the files `names` (or the folder alone, where there are
    none), and holds all of `said`. The search must pass it over with a line on the same folder and file, and find the
    checkpoint of `found_step` instead.
    """
    folder = checkpoints / spoilt
    try:
        Checkpoint.open(folder)
    except CheckpointError as error:
        text = str(error)
        problem = line_of(error)
    else:
        return "it was loaded without a word"
    if problem is not None:
        return problem
    missing = [part for part in (str(folder), *said) if part not in text]
    if missing:
        return f"{missing[0]!r} is not said in: {text}"
    if names and not any(name in text for name in names):
        return f"none of {sorted(names)} is named in: {text}"
    search = find_newest(checkpoints)
    step = search.checkpoint.step if search.checkpoint is not None else None
    if step != found_step:
        return f"the search found step {step}, not {found_step}; it said: {search.damaged}"
    lines = [line for line in search.damaged if line.startswith(f"{folder}: ")]
    # safetensors names one of several bad tensors at random: the rest of the two lines may differ.
    if len(lines) != 1 or (names and not any(name in lines[0] for name in names)):
        return f"the search does not name what it passed over: {search.damaged}"
    return None


def listing(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder, links not followed: kind and mode, size, time of the last change, place of a link."""
    found: dict[str, tuple[object, ...]] = {}
    for parent, folders, files in os.walk(folder):
        for name in [".", *folders, *files]:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            link = os.readlink(path) if os.path.islink(path) else None
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, link)
    return found


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list that holds, after the block, by how many bytes this process grew in it at its highest."""
    growth: list[int] = []
    # The kernel's own high-water mark, set back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield growth
    growth.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"no {name} in /proc/self/status")
