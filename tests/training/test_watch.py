"""Claim: a real run is watched from its start to its end: a hang on another machine is found from that of rank 0 and
named, what takes long and gets on is no hang, and a watch that cannot be kept costs one line and no run.

Run: pytest tests/training/test_watch.py
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from slope_dist.training.ending import END
from slope_dist.training.folder import RunFolder
from tests.distributed import Outcome, end_ranks
from tests.runs import pretrain, step_rows, watch_engines, write_config

TIMEOUT = 4.0


def run(config: Path, ranks: int, function: Any, *arguments: Any) -> list[Outcome]:
    return end_ranks(function, ranks, str(config), *arguments, process_group=False)


def on_machines_of_one_rank(config: str) -> None:
    """The entry point; each rank is alone on what it takes for its machine, and rank 1 is stopped in step 3."""
    from slope_dist.training import trainer, watch

    def with_damaged(*arguments: Any) -> RunFolder:
        folder = RunFolder(*arguments)
        folder.damaged = {"step-00000009"}
        return folder

    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    watch.machine = lambda: f"machine {rank}"
    # As if it had gone on before a damaged one.
    trainer.RunFolder = with_damaged
    if rank == "1":
        watch_engines(
            lambda event, _, step: os.kill(os.getpid(), signal.SIGSTOP) if (event, step) == ("before step", 3) else None
        )
    raise SystemExit(pretrain("--config", config))


def test_a_hang_on_another_machine(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus, watch__hang_timeout=TIMEOUT, watch__first_step_timeout=60, parallel__data=2)
    outcomes = run(config, 2, on_machines_of_one_rank)
    assert [outcome.code for outcome in outcomes] == [-signal.SIGKILL] * 2
    lines = [line for outcome in outcomes for line in outcome.errors.splitlines()]
    assert "rank 1 (" in lines[0] and "is late at step 3, in the step itself: it is stopped" in lines[0]
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    end = json.loads((tmp_path / "run" / END).read_text())
    assert (end["how"], end["late"], end["step"]) == ("failed", [1], 3)
    assert end["damaged"] == ["step-00000009"]
    (folder,) = (tmp_path / "run" / "watch").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "report.json",
        "rank-00000.stacks.txt",
        "rank-00001.stacks.txt",
    }


def slow(config: str) -> None:
    """The entry point; twice in a run an evaluation takes longer than the timeout, batch by batch, and saves too."""
    from slope_dist.checkpoint import writer
    from slope_dist.training import evaluation

    batches, save = evaluation.evaluation_batches, writer.save

    def slow_batches(*given: Any, **named: Any) -> Any:
        for batch in batches(*given, **named):
            time.sleep(TIMEOUT / 2.5)
            yield batch

    def slow_save(*given: Any, **named: Any) -> Any:
        time.sleep(1.2 * TIMEOUT)
        return save(*given, **named)

    evaluation.evaluation_batches, writer.save = slow_batches, slow_save
    raise SystemExit(pretrain("--config", config))


@pytest.mark.slow
def test_what_takes_long_and_gets_on_is_no_hang(tmp_path: Path, corpus: Path) -> None:
    """3 batches of 1.6 s each time, and saves of 4.8 s."""
    config = write_config(
        tmp_path,
        corpus,
        watch__hang_timeout=TIMEOUT,
        watch__first_step_timeout=60,
        training__steps=2,
        evaluation__interval=1,
        checkpoint__interval=1,
        adapters__rank=0,
    )
    (outcome,) = run(config, 1, slow)
    assert outcome.code == 0, outcome.errors
    assert not (tmp_path / "run" / "watch").exists()


def without(config: str, what: str) -> None:
    """The entry point; the machine lacks something that a watch needs."""
    from slope_dist.training import watch

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(11, "Resource temporarily unavailable")

    if what == "memory":
        os.memfd_create = fails  # type: ignore[assignment]
    elif what == "processes":
        watch._spawn = fails
    elif what == "a watchdog that stays":
        spawn = watch._spawn

        def spawn_and_kill(*given: Any) -> Any:
            process = spawn(*given)
            process.kill()
            return process

        watch._spawn = spawn_and_kill
    raise SystemExit(pretrain("--config", config))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("memory", "warning: hangs of rank 0 are not found: "),
        ("processes", "no watchdog could be started ("),
        ("a watchdog that stays", "has ended (-9): hangs are not found any more"),
    ],
)
def test_a_watch_that_cannot_be_kept_costs_a_line(tmp_path: Path, corpus: Path, what: str, said: str) -> None:
    config = write_config(tmp_path, corpus, training__steps=2, adapters__rank=0)
    (outcome,) = run(config, 1, without, what)
    assert outcome.code == 0
    warnings = [line for line in outcome.errors.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and said in warnings[0], outcome.errors
    assert len(step_rows(tmp_path / "run")) == 2


def unwatched(config: str) -> None:
    """The entry point, in a process that may start no other."""
    from slope_dist.training import watch

    def fails(*_: Any) -> Any:
        raise AssertionError

    watch._spawn = fails
    raise SystemExit(pretrain("--config", config))


def test_no_timeout_no_watch(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus, training__steps=1, adapters__rank=0, watch__hang_timeout=None)
    (outcome,) = run(config, 1, unwatched)
    assert (outcome.code, outcome.errors) == (0, "")
