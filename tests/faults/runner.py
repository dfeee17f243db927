"""Runs trials of faults one after another, keeps what is done, and goes on there until the sources change.

A new kind of trial is one line in kinds.py:

    Kind("name", "what every trial shows, in one sentence", number of trials, start)

`start(shared)` makes what all its trials have in common, in a folder that outlives the process (see shared.py), and
returns the trial: `trial(index, random, room)` with an empty folder of its own, which says what went wrong, or None.
What it does may depend on nothing else, so that one trial can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import pytest

from tests.faults.bounds import upper_bound
from tests.resumable import sources_hash

SOURCES = ("slope_dist", "launch", "tests/faults", "tests/runs.py", "tests/distributed.py", "constraints.txt")

Trial = Callable[[int, random.Random, Path], str | None]

_KEEP_SECONDS = 2.0
_MAX_SHOWN = 10
_MAX_TEXT = 1000
_HEADINGS = ("trials", "failures", "95 % bound", "seed", "seconds", "median", "slowest")


@dataclass(frozen=True)
class Kind:
    """One kind of trial.

    Attributes:
        name: for the command line.
        claim: what every trial shows, in one sentence.
        trials: how many are run.
        start: from the folder of what is shared to the trial (see the module).
        limit: seconds after which a trial has failed; it is broken off where a signal can do that.
    """

    name: str
    claim: str
    trials: int
    start: Callable[[Path], Trial]
    limit: float = 10.0


@dataclass
class Progress:
    """What is known of one kind with one seed.

    Attributes:
        done: number of trials that have ended, the first ones.
        failures: what went wrong, by the number of the trial.
        milliseconds: what each trial took.
        skipped: why the kind cannot be tried on this machine.
    """

    done: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    milliseconds: list[float] = field(default_factory=list)
    skipped: str | None = None


class TooSlowError(BaseException):
    """A trial that is broken off; no `Exception`, lest what is tried take it for one of its own."""


class Runner:
    """Runs trials and keeps their results.

    Args:
        folder: where results and what trials share are kept; made if missing.
        seed: decides all random choices of all trials.
        scale: factor on the number of trials.
        sources: hash under which results are valid.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        seed: int = 1,
        scale: float = 1.0,
        sources: str | None = None,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.scale = scale
        self.sources = sources or sources_hash(SOURCES)
        self.say = say
        self.shared = folder / "shared"

    def trials_of(self, kind: Kind) -> int:
        """Number of trials of a kind at this scale, at least one."""
        return max(1, round(kind.trials * self.scale))

    def run(self, kinds: list[Kind], minutes: float | None = None) -> bool:
        """Run what has not been run; returns whether nothing that is known has failed.

        With `minutes`, no trial is begun after so many.
        """
        end = None if minutes is None else time.monotonic() + 60 * minutes
        width = max(len(kind.name) for kind in kinds)
        self.say(f"{'kind':{width}}  " + " ".join(f"{heading:>10}" for heading in _HEADINGS))
        self._prepare()
        good = True
        for kind in kinds:
            progress = self.progress(kind)
            kept = progress.done >= self.trials_of(kind)
            problem = None if kept else self._run_kind(kind, progress, end)
            good = good and problem is None and not progress.failures
            self._report(kind, progress, problem, width, kept)
        return good

    def run_only(self, kinds: list[Kind], indices: list[int]) -> bool:
        """Repeat single trials, whatever is known of them; the rooms of those that fail stay, to be looked at."""
        self._prepare()
        good = True
        for kind in kinds:
            trial = kind.start(self.shared)
            for index in indices:
                room = self.folder / "rooms" / f"{_file_name(kind.name)}-{index}"
                shutil.rmtree(room, ignore_errors=True)
                room.mkdir(parents=True)
                problem = self._try(kind, trial, index, room)
                self.say(f"{kind.name} {index}: " + (f"{problem}\n    its room is {room}" if problem else "passed"))
                good = good and problem is None
                if problem is None:
                    shutil.rmtree(room)
        return good

    def markdown(self, kinds: list[Kind]) -> list[str]:
        """The table of what is known, for a document."""
        lines = ["| kind | claim | trials | failures | 95 % upper bound | seed | seconds |", "|---" * 7 + "|"]
        for kind in kinds:
            progress = self.progress(kind)
            bound = upper_bound(len(progress.failures), progress.done)
            seconds = sum(progress.milliseconds) / 1000
            cells = [kind.name, kind.claim, progress.done, len(progress.failures), _percent(bound), self.seed]
            lines.append("| " + " | ".join(str(cell) for cell in [*cells, f"{seconds:.0f}"]) + " |")
        return lines

    def progress(self, kind: Kind) -> Progress:
        """What an earlier run of the same sources and seed has left."""
        try:
            stored = json.loads(self._path(kind).read_text())
            if stored.pop("sources") != self.sources:
                return Progress()
            failures = {int(index): text for index, text in stored.pop("failures").items()}
            return Progress(failures=failures, **stored)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Absent, or cut short by something else than this program: nothing is lost but time.
            return Progress()

    def _run_kind(self, kind: Kind, progress: Progress, end: float | None) -> str | None:
        """Run what is left of a kind, up to `end`; returns why it could not be, None where it could."""
        if end is not None and time.monotonic() >= end:
            return None
        progress.skipped = None
        kept_at = time.monotonic()
        try:
            with _time_limit(None if end is None else end - time.monotonic()):
                trial = kind.start(self.shared)
            # On the file system of what is shared, which a trial may then link into its room.
            with tempfile.TemporaryDirectory(prefix="room-", dir=self.folder) as scratch:
                room = Path(scratch)
                for index in range(progress.done, self.trials_of(kind)):
                    now = time.monotonic()
                    if end is not None and now >= end:
                        break
                    if now - kept_at > _KEEP_SECONDS:
                        self._keep(kind, progress)
                        kept_at = now
                    start = time.perf_counter()
                    problem = self._try(kind, trial, index, room)
                    progress.milliseconds.append(round(1000 * (time.perf_counter() - start), 1))
                    progress.done = index + 1
                    if problem is not None:
                        progress.failures[index] = problem
                    _empty(room)
        except TooSlowError:
            # The time was up while what is shared was made; what of it is whole is kept.
            return None
        except pytest.skip.Exception as reason:
            progress.skipped = str(reason)
        except Exception:
            # What trials share could not be made, for one. The other kinds go on.
            return f"did not run:\n{traceback.format_exc()}"
        finally:
            # After Ctrl-C too.
            self._keep(kind, progress)
        return None

    def _try(self, kind: Kind, trial: Trial, index: int, room: Path) -> str | None:
        start = time.perf_counter()
        try:
            # A text as seed is hashed by a function that does not change from one process to the next.
            with _time_limit(kind.limit):
                problem = trial(index, random.Random(f"{self.seed}/{kind.name}/{index}"), room)
        except TooSlowError:
            return f"still running after {kind.limit:.0f} s"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(where[-4:]))
            return f"raised {type(error).__name__}: {str(error)[:_MAX_TEXT]} ({places})"
        seconds = time.perf_counter() - start
        return f"took {seconds:.1f} s" if problem is None and seconds > kind.limit else problem

    def _report(self, kind: Kind, progress: Progress, problem: str | None, width: int, kept: bool) -> None:
        wanted = self.trials_of(kind)
        times = progress.milliseconds or [0]
        bound = upper_bound(len(progress.failures), progress.done)
        cells = [
            str(progress.done),
            str(len(progress.failures)),
            _percent(bound),
            str(self.seed),
            f"{sum(times) / 1000:.1f}",
            f"{median(times):.1f} ms",
            f"{max(times):.0f} ms",
        ]
        state = "FAIL" if progress.failures or problem else "pass" if progress.done else "not tried"
        if progress.done < wanted and not problem:
            state += f", {wanted - progress.done} trials are left: the same command goes on"
        if progress.skipped is not None:
            state = f"skipped: {progress.skipped}"
        self.say(f"{kind.name:{width}}  " + " ".join(f"{cell:>10}" for cell in cells) + f"  {state}{' (kept)' * kept}")
        for index, text in sorted(progress.failures.items())[:_MAX_SHOWN]:
            self.say(f"    {index}: {text[:_MAX_TEXT]}")
            self.say(f'      again: python -m tests.faults "{kind.name}" --only {index} --seed {self.seed}')
        if len(progress.failures) > _MAX_SHOWN:
            self.say(f"    and {len(progress.failures) - _MAX_SHOWN} more in {self._path(kind)}")
        if problem is not None:
            self.say(f"    {problem}")

    def _prepare(self) -> None:
        """Forget what trials of other sources shared."""
        mark = self.shared / "sources"
        if not mark.exists() or mark.read_text() != self.sources:
            shutil.rmtree(self.shared, ignore_errors=True)
            self.shared.mkdir(parents=True)
            mark.write_text(self.sources)

    def _path(self, kind: Kind) -> Path:
        return self.folder / f"{_file_name(kind.name)}-seed{self.seed}.json"

    def _keep(self, kind: Kind, progress: Progress) -> None:
        path = self._path(kind)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"sources": self.sources, **asdict(progress)}) + "\n")
        os.replace(part, path)


def _percent(rate: float) -> str:
    return f"{100 * rate:.2g} %" if rate < 0.995 else "100 %"


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _empty(room: Path) -> None:
    for entry in os.scandir(room):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise in the block once it has taken so long; where it runs Python, or waits for what a signal ends."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
