"""The private SLURM of all tests here, and jobs in it that are the real script with a tiny config."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import small_corpus, step_rows, write_config
from tests.slurm.cluster import Slurm, missing, private_slurm

SCRIPT = "launch/slurm/pretrain.sbatch"
STEPS = 120
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing():
        pytest.skip(missing())
    with private_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass
class Job:
    """A submitted job, or an array of them."""

    slurm: Slurm
    number: str
    folder: Path

    @property
    def log(self) -> str:
        path = self.folder / f"slope-{self.number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def state(self) -> str:
        return self.slurm.state(self.number)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The lines of the script's journal: a decision after each part."""
        path = self.folder / f"jobs/{self.number}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []

    def ended(self, state: str = "COMPLETED") -> None:
        """Wait for the end of all parts and elements, which is to be in `state`."""
        self.wait("the job has ended", lambda: all(word in ENDED for word in self.state.split()))
        assert set(self.state.split()) == {state}, f"{self.state}\n{self.tail()}"

    def reached(self, step: int) -> None:
        """Wait until training has done a step."""
        self.wait(f"step {step} is done", lambda: self.last_step() >= step)

    def last_step(self) -> int:
        try:
            return max((row["step"] for row in step_rows(self.run)), default=0)
        except FileNotFoundError:
            return 0

    def decided(self, number: int) -> dict[str, Any]:
        """Wait for the decision after a part, counted from 1."""
        self.wait(f"part {number} has ended", lambda: len(self.parts) >= number)
        return self.parts[number - 1]

    def wait(self, what: str, happened: Callable[[], object]) -> None:
        self.slurm.wait(what, lambda: happened() or self.gave_up(what))

    def gave_up(self, what: str) -> bool:
        """False, unless the job has ended while a test waits for what cannot be any more."""
        if what != "the job has ended" and all(word in ENDED for word in self.state.split()):
            pytest.fail(f"the job ended ({self.state}) before {what}\n{self.tail()}")
        return False

    def tail(self) -> str:
        return "\n".join(self.log.splitlines()[-60:])

    def early_signal(self) -> None:
        """What SLURM sends some minutes before the time limit."""
        self.slurm.run("scancel", "--batch", "--signal=USR1", self.number)

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes of this job, by rank."""
        found = {}
        for process in psutil.process_iter():
            try:
                words, variables = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if str(self.folder / "config.json") in words and "launch/pretrain.py" in words[1:3]:
                found[int(variables.get("RANK", variables.get("SLURM_PROCID", "0")))] = process
        return found

    @property
    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in step_rows(self.run)}

    @property
    def resumed_after(self) -> list[int]:
        return [int(step) for step in re.findall(r"resumed from .* after step (\d+)", self.log)]


Submit = Callable[..., Job]


@pytest.fixture(scope="session")
def submit(slurm: Slurm, corpus: Path) -> Submit:
    """Submit the real script for a small run in a folder, with options of sbatch and changes of the config."""

    def submit(
        folder: Path,
        *options: str,
        launcher: str = "srun",
        ranks: int = 1,
        variables: dict[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        **changes: Any,
    ) -> Job:
        changes = {"training__steps": STEPS, "checkpoint__interval": 10} | changes
        config = write_config(folder, corpus, **changes)
        settings = {
            "SLOPE_LAUNCHER": launcher,
            "SLOPE_RANKS_PER_NODE": str(ranks),
            "SLOPE_JOBS": str(folder / "jobs"),
            "SLOPE_PYTHON": sys.executable,
        } | (variables or {})
        number = slurm.run(
            *("sbatch", "--parsable", f"--output={folder}/slope-%A.log", *options),
            *(SCRIPT, "--config", str(config), *arguments),
            **settings,
        ).strip()
        return Job(slurm, number, folder)

    return submit


@pytest.fixture(scope="session")
def straight(submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The uninterrupted run, two nodes with one rank each, that the others are compared with."""
    job = submit(tmp_path_factory.mktemp("straight"), "--nodes=2")
    job.ended()
    return job
