"""Where an attack is planted, and what must be left of it: a refusal, and nothing that has run or changed."""

from __future__ import annotations

import io
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slope_dist.config import load_config
from slope_dist.data.corpus import Corpus
from slope_dist.errors import UserError
from slope_dist.training.folder import read_rows
from tests.faults.refusal import line_of, listing, peak_memory, wrongly_judged
from tests.faults.shared import NEWEST, PREVIOUS_STEP, GoodRun
from tests.runs import VOCAB_SIZE

SHELL, PYTHON, FILE, TORCH, OLD_TORCH = "shell", "python", "file", "torch.save", "torch.save, old"
"""What a pickle calls when it is loaded, or how it is wrapped."""

_MEMORY_BESIDE = 200 * 2**20
_ADDRESS_SPACE = 4 * 2**30


class Attack(NamedTuple):
    """`meet`(ground) plants it, lets it be read, and returns what went wrong."""

    what: str
    meet: Callable[[Ground], str | None]


def on_checkpoint(what: str, spoil: Callable[[Path, Path], object], names: Sequence[str]) -> Attack:
    """An attack that `Ground.checkpoint` meets."""
    return Attack(what, lambda at: at.checkpoint(spoil, names))


class _Called:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@dataclass
class Ground:
    """The room of one trial.

    Attributes:
        good: what there is to spoil.
        room: the trial's folder.
        index: its number.
    """

    good: GoodRun
    room: Path
    index: int = 0

    @property
    def canary(self) -> Path:
        """The file that is there once an attack's code has run."""
        return self.room / "canary"

    def pickled(self, how: str) -> bytes:
        """A pickle that makes the canary when it is loaded."""
        calls = {
            SHELL: _Called(os.system, f"touch {self.canary}"),
            PYTHON: _Called(exec, f"open({str(self.canary)!r}, 'w').close()"),
            FILE: _Called(open, str(self.canary), "w"),
        }
        if how in calls:
            return pickle.dumps(calls[how], protocol=self.index % (pickle.HIGHEST_PROTOCOL + 1))
        file = io.BytesIO()
        state = {"model": torch.zeros(3), "attack": calls[SHELL]}
        torch.save(state, file, _use_new_zipfile_serialization=how == TORCH)
        return file.getvalue()

    def checkpoint(
        self, spoil: Callable[[Path, Path], object], names: Sequence[str], found_step: int = PREVIOUS_STEP
    ) -> str | None:
        """Spoil the newest checkpoint by `spoil`(its folder, that of all); it must be refused by one of `names`."""
        checkpoints = self.good.copy_into(self.room)
        spoil(checkpoints / NEWEST, checkpoints)
        return self.watch(lambda: wrongly_judged(checkpoints, NEWEST, names, found_step))

    def corpus(self, spoil: Callable[[Path], object], said: str, manifest: bool = True) -> str | None:
        """Spoil a copy of the corpus; opening and verifying it must be refused, saying `said`."""
        folder = self.room / "corpus"
        shutil.copytree(self.good.corpus, folder)
        if not manifest:
            (folder / "manifest.json").unlink()
        spoil(folder)

        def read() -> None:
            corpus = Corpus.open(folder, "train", VOCAB_SIZE)
            corpus.verify()

        return self.watch(lambda: _refusal(read, said))

    def config(self, make: Callable[[Path], object]) -> str | None:
        """A run's file made by `make`(path)."""
        path = self.room / "run.json"
        make(path)
        return self.watch(lambda: _refusal(lambda: load_config(path), str(path)))

    def metrics(self, make: Callable[[Path], object]) -> str | None:
        """A file of metrics made by `make`(path)."""
        path = self.room / "metrics.jsonl"
        make(path)
        return self.watch(lambda: _refusal(lambda: read_rows(path), str(path)))

    def watch(self, read: Callable[[], str | None]) -> str | None:
        """What is wrong with `read`, or with what it did to the room and to the memory of this process."""
        before = listing(self.room)
        size = sum(os.lstat(path).st_blocks * 512 for path in before)
        with _bounded_addresses(), peak_memory() as growth:
            problem = read()
        if problem is not None:
            return problem
        if self.canary.exists():
            return "code in the file was run"
        if listing(self.room) != before:
            changed = {path for path, _ in listing(self.room).items() ^ before.items()}
            return f"files were changed: {sorted(changed)}"
        if growth[0] > 2 * size + _MEMORY_BESIDE:
            return f"memory grew by {growth[0] >> 20} MiB for files of {size >> 20} MiB"
        return None


def _refusal(read: Callable[[], object], said: str) -> str | None:
    try:
        read()
    except UserError as error:
        problem = line_of(error)
        return problem or (None if said in str(error) else f"{said!r} is not said in: {error}")
    return "it was read without a word"


@contextmanager
def _bounded_addresses() -> Iterator[None]:
    """Let what asks for memory without end fail here, not take the machine with it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
