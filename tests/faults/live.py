"""Real runs to be hurt: a tiny model that saves often, whole runs to compare with, and what must be left afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from slope_dist.checkpoint import Checkpoint, find_newest
from slope_dist.checkpoint.format import folder_name, step_of
from tests.distributed import Outcome, end_ranks, run_ranks
from tests.runs import pretrain, small_corpus, step_rows, train, write_config

FORKED = end_ranks
STEPS = 10
FIRST_ADAPTER_STEP = 6
CHANGES: dict[str, Any] = {
    "training__steps": STEPS,
    "adapters__fraction": 0.5,
    # Between refreshes before steps 1 and 6 the masks are state.
    "sparsity__column_mask_interval": 5,
    "checkpoint__interval": 1,
    "checkpoint__keep": STEPS,
    "model__num_layers": 2,
    "evaluation__samples": 2,
    "training__micro_batch_size": 1,
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank, ZeRO 0": {"parallel__zero_stage": 0},
    "data 2, ZeRO 3": {"parallel__data": 2, "parallel__zero_stage": 3},
    "data 4, FSDP2": {"parallel__data": 4, "parallel__engine": "fsdp"},
    "pipeline 2, ZeRO 1": {"parallel__pipeline": 2, "parallel__zero_stage": 1},
    "pipeline 2 x data 2, ZeRO 1": {"parallel__pipeline": 2, "parallel__data": 2, "parallel__zero_stage": 1},
    "tensor 2, ZeRO 2": {"parallel__tensor": 2, "parallel__zero_stage": 2},
    "tensor 2 x data 2, FSDP2": {"parallel__tensor": 2, "parallel__data": 2, "parallel__engine": "fsdp"},
    "tensor 2 x pipeline 2, ZeRO 0": {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__zero_stage": 0},
}
"""The 8 ways to place up to four ranks by tensor 1, 2, pipeline 1, 2 and data 1, 2, 4; all ZeRO stages and FSDP2."""

FIVE = [
    "one rank, ZeRO 0",
    "data 2, ZeRO 3",
    "tensor 2, ZeRO 2",
    "pipeline 2, ZeRO 1",
    "tensor 2 x data 2, FSDP2",
]
"""Those in which a run goes on to the last bit."""


def ranks_of(layout: str) -> int:
    """How many ranks a layout has."""
    changes = LAYOUTS[layout]
    return int(
        changes.get("parallel__tensor", 1) * changes.get("parallel__pipeline", 1) * changes.get("parallel__data", 1)
    )


class WholeRuns:
    """Runs that nobody has disturbed, each made once in the folder of what trials share, and those to be hurt.

    Args:
        shared: that folder.
        end_ranks: starts the ranks of a run that is hurt and of those that go on, and says how each ended.

    Attributes:
        launched: whether a launcher stands above these ranks.
    """

    def __init__(self, shared: Path, end_ranks: Callable[..., list[Outcome]] = FORKED) -> None:
        self._shared = shared
        self._end_ranks = end_ranks
        self.launched = end_ranks is not FORKED
        self.corpus = small_corpus(shared)

    def run(self, layout: str, **changes: Any) -> Path:
        """The run folder of a layout; it has the checkpoint of every step."""
        name = re.sub(r"[^a-z0-9]+", "-", f"{layout} {sorted(changes.items())}".lower())
        folder = self._shared / "whole" / name
        if not folder.exists():
            part = folder.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            path = write_config(part, self.corpus, **CHANGES | LAYOUTS[layout] | changes)
            run_ranks(train, ranks_of(layout), str(path))
            part.rename(folder)
        return folder / "run"

    def config(self, room: Path, layout: str, **changes: Any) -> str:
        """The config of a run of the same kind in `room`."""
        return str(write_config(room, self.corpus, **CHANGES | LAYOUTS[layout] | changes))

    def end(self, function: Callable[..., Any], layout: str, config: str, *arguments: Any) -> list[Outcome]:
        """How the ranks of a layout ended, of which each called `function` with these arguments."""
        return self._end_ranks(function, ranks_of(layout), config, *arguments, process_group=False)

    def go_on(self, layout: str, config: str) -> str | None:
        """Give the command again; what ranks say that did not end well, None if all did."""
        return failed(self.end(entry_point, layout, config))


_TRIAL = "SLOPE_DIST_TRIAL"
_SHARED_MEMORY = Path("/dev/shm")


def mark_processes(room: Path) -> None:
    """Let whatever this rank starts be found by `leftovers`, and itself."""
    os.environ[_TRIAL] = str(room)
    (room / f"process-{os.getpid()}").touch()


def leftovers(room: Path) -> str | None:
    """What is still there of ranks that were marked: processes, or files in shared memory; None if nothing."""
    ranks = {int(path.name.removeprefix("process-")) for path in room.glob("process-*")}
    end = time.monotonic() + 3.0
    while left := [process.pid for process in psutil.process_iter() if _is_of(process, room, ranks)]:
        if time.monotonic() > end:
            return f"processes {left} are left"
        time.sleep(0.1)
    files = [path.name for path in _SHARED_MEMORY.iterdir()] if _SHARED_MEMORY.is_dir() else []
    mine = [name for name in files if {int(number) for number in re.findall(r"\d+", name)} & ranks]
    return f"{mine} are left in {_SHARED_MEMORY}" if mine else None


def _is_of(process: psutil.Process, room: Path, ranks: set[int]) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.pid in ranks or process.environ().get(_TRIAL) == str(room)
    except psutil.Error:
        return False


def copy_checkpoint(source: Path, step: int, room: Path) -> None:
    """Let the run in `room` find the checkpoint of a step of another run."""
    target = room / "run" / "checkpoints" / folder_name(step)
    shutil.copytree(source / "checkpoints" / folder_name(step), target, copy_function=os.link)


def entry_point(config: str) -> None:
    """The life of a rank: the real program, from a command line."""
    raise SystemExit(pretrain("--config", config))


def killed_later(config: str, victims: list[int], seconds: float) -> None:
    """The real program; a rank of `victims` is killed so many seconds after its first step has begun."""
    if int(os.environ.get("RANK", "0")) in victims:
        on_first_step(lambda: threading.Thread(target=_kill_after, args=(seconds,), daemon=True).start())
    entry_point(config)


def _kill_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def on_first_step(act: Callable[[], None]) -> None:
    """Let `act` run when the first step of this process begins."""
    from tests.runs import watch_engines

    watch_engines(lambda event, engine, step: act() if (event, step) == ("before step", 1) else None)


def committed(outputs: list[str]) -> int:
    """The newest step that a run has reported as saved; 0 if none."""
    return max((int(step) for text in outputs for step in re.findall(r"^saved step (\d+):", text, re.M)), default=0)


def lost(run: Path, whole: Path, reported: int) -> str | None:
    """What is wrong with the newest checkpoint of a run that was hurt; None if it is as that of the whole run.

    It verifies, is not older than the newest that was reported, and holds the same bytes.
    """
    found = find_newest(run / "checkpoints").checkpoint
    if found is None:
        return None if reported == 0 else f"step {reported} was reported as saved, and no checkpoint verifies"
    if found.step < reported:
        return f"step {reported} was reported as saved, and the newest that verifies is of step {found.step}"
    return same_files(found, whole)


def same_files(found: Checkpoint, whole: Path) -> str | None:
    """Whether a checkpoint has the same files as that of the same step of an undisturbed run of its layout."""
    expected = Checkpoint.open(whole / "checkpoints" / found.path.name, verify=False).manifest
    if {name: file.sha256 for name, file in found.manifest.files.items()} != {
        name: file.sha256 for name, file in expected.files.items()
    }:
        return f"the files of {found.path.name} are not those of the undisturbed run"
    for key in ("optimizer_steps", "next_sample", "adapters", "fingerprint", "skipped_steps"):
        if found.scalars[key] != expected.scalars[key]:
            return f"{found.path.name}: {key} is {found.scalars[key]}, in the undisturbed run {expected.scalars[key]}"
    return None


def unlike(run: Path, whole: Path) -> str | None:
    """How a finished run differs from the undisturbed one of its layout, in files or losses; None if it does not."""
    found = find_newest(run / "checkpoints").checkpoint
    if found is None or found.step != STEPS:
        return f"the newest checkpoint is {None if found is None else found.path.name}"
    mine, other = ([(row["step"], row["loss"], row["grad_norm"]) for row in step_rows(path)] for path in (run, whole))
    # Who begins from another run's checkpoint has the later rows alone.
    other = other[-len(mine) :]
    if mine != other or not mine:
        first = next((pair for pair in zip(mine, other, strict=False) if pair[0] != pair[1]), mine)
        return f"the rows differ: {first}"
    return same_files(found, whole)


def failed(outcomes: list[Outcome]) -> str | None:
    """What ranks that should have ended well say; None if all did."""
    bad = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.code != 0]
    return None if not bad else "; ".join(f"rank {rank} ended with {o.code}: {o.errors[-400:]}" for rank, o in bad)


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in a run folder."""
    return sorted(step for path in (run / "checkpoints").iterdir() if (step := step_of(path.name)) is not None)
