"""Disks that are full, slow or broken for a while, on one rank, before, in the middle of or at the end of a save."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.live import FIVE, WholeRuns, entry_point, failed, ranks_of, unlike
from tests.runs import watch_engines

WAYS = ("no space", "I/O error", "size limit", "slow", "no folder")
FILES = ("weights", "optimizer", "manifest")


class _Failing:
    """A file whose disk fails after so many bytes."""

    def __init__(self, file: Any, room: int, code: int) -> None:
        self._file = file
        self._room = room
        self._code = code

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(self._code, os.strerror(self._code))
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def hurt(config: str, victim: int, way: str, file: str, room: int, first: int, times: int) -> None:
    """The real program; the `victim`'s disk fails `times` times from the writing of step `first` on."""
    from slope_dist.checkpoint import tensor_file, writer

    left = times
    durable, save = tensor_file.durable_file, writer.save

    @contextmanager
    def failing(path: Path) -> Iterator[Any]:
        nonlocal left
        step = int(re.findall(r"step-(\d+)", str(path))[-1]) if "step-" in str(path) else 0
        if left == 0 or file not in path.name or step < first:
            with durable(path) as opened:
                yield opened
            return
        left -= 1
        if way == "slow":
            time.sleep(0.3)
        if way == "no folder":
            shutil.rmtree(path.parent, ignore_errors=True)
        with durable(path) as opened:
            code = {"no space": errno.ENOSPC, "I/O error": errno.EIO}.get(way)
            yield opened if code is None else _Failing(opened, room, code)

    def limited(*given: Any, **named: Any) -> Any:
        nonlocal left
        if left == 0 or given[1] < first:
            return save(*given, **named)
        left -= 1
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 + room, before[1]))
        try:
            return save(*given, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    if int(os.environ.get("RANK", "0")) == victim:
        if way == "size limit":
            writer.save = limited
        else:
            tensor_file.durable_file = writer.durable_file = failing
    # Steps so short leave no time for a second attempt, which is what is tried here as well.
    watch_engines(lambda event, engine, step: time.sleep(0.05) if event == "after step" else None)
    entry_point(config)


class BadDisk:
    """Training goes on, what was saved stays, each failure is told in a line, and later steps are saved."""

    def __init__(self, whole: WholeRuns) -> None:
        self.whole = whole

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        """One bad disk."""
        way, layout = WAYS[index % len(WAYS)], FIVE[index // len(WAYS) % len(FIVE)]
        ranks = ranks_of(layout)
        file = draw.choice(FILES)
        victim = 0 if file == "manifest" else draw.randrange(ranks)
        times, first = draw.randrange(1, 4), draw.randrange(2, 8)
        space = draw.choice([0, 100, draw.randrange(60_000)])
        config = self.whole.config(room, layout, checkpoint__asynchronous=draw.random() < 0.7)
        where = f"{layout}: {way} in {file} of rank {victim}, {times} times from step {first}, {space} bytes"
        outcomes = self.whole.end(hurt, layout, config, victim, way, file, space, first, times)
        problem = failed(outcomes) or unlike(room / "run", self.whole.run(layout))
        if problem is not None:
            return f"{where}: {problem}"
        lines = [line for line in outcomes[0].output.splitlines() if " was not saved: " in line]
        for line in lines:
            if not re.match(
                rf"warning: .*: step \d+ was not saved: (rank {victim}: )?.*(; it is given up|again in .*s)$", line
            ):
                return f"{where}: {line}"
        if way in ("no space", "I/O error") and space == 0 and not lines and file != "optimizer":
            return f"{where}: nothing was said"
        left = [path.name for path in (room / "run" / "checkpoints").iterdir() if ".tmp-" in path.name]
        return f"{where}: left behind: {left}" if left else None
