"""One fault after the other, for as long as you like: a run of two ranks that is started again by the same command, and
nothing else, comes to the losses of a run that nobody has disturbed.

    make test-soak                                      an hour
    python -m tests.faults.soak --minutes 5 --every 20  a fault each 20 s, for five minutes

Runs are repeated until the time is over; the last one is let go on to its end. What became of each fault is a line, and
the last thing printed is a summary as JSON, which is also in `summary.json` of the folder.

Exit code 0 if every run had the right losses, nothing was left behind and nothing was to be done by hand; else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from slope_dist.lines import port_to_meet_at
from slope_dist.training.ending import END, read_history
from tests.distributed import ROOT
from tests.runs import small_corpus, step_rows, write_config

FOLDER = ROOT / "build" / "soak"
RANKS = 2
HANG, START = 10.0, 60.0
"""The timeouts of the runs, in seconds."""

OVERDUE = 150.0
"""Seconds after a fault that ends a job within which it must have ended; then a person would have to come."""

NO_PROGRESS = 12
"""Parts in a row that save nothing, after which a run does not get on."""

TOLERANCE = 1e-3
SAMPLE_SECONDS = 2.0
SETTLED = 10.0
"""Seconds after its first step from which a part's memory is looked at."""

_MARK = "SLOPE_DIST_SOAK"
OUTSIDE = (
    "kill one",
    "kill all",
    "stop one",
    "SIGTERM one",
    "SIGTERM all",
    "SIGUSR1 all",
    "stop file",
    "kill launcher",
)
INSIDE = (
    "hold the lock",
    "segfault",
    "abort",
    "stuck loader",
    "skip a collective",
    "exception",
    "MemoryError",
    "bad disk",
)
AT_START = ("kill one", "kill all", "SIGTERM one", "SIGTERM all", "SIGUSR1 all")
"""What is done before a first step, too: hangs are not looked for before the ranks have met (docs/watching.md)."""

START_SHARE = 0.2
"""Of the faults."""

HANGS = ("stop one", "hold the lock", "stuck loader", "skip a collective")
GOES_ON = ("bad disk",)


@dataclass
class Fault:
    """One, and what became of it."""

    name: str
    rank: int
    when: float
    at: str
    ended: float | None = None
    how: str = ""


@dataclass
class Soak:
    """All that is known so far.

    Attributes:
        faults: in order.
        problems: what went wrong, one line each.
        seconds_kept: time of the steps that count, those of which the last losses are.
        samples: of a rank in a part: (part, rank, seconds of its age, resident bytes, open files, threads).
    """

    options: argparse.Namespace
    start: float
    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds_kept: float = 0.0
    steps_kept: int = 0
    hangs_found: int = 0
    false_alarms: int = 0
    runs: int = 0
    parts: int = 0
    worst_difference: float = 0.0
    samples: list[tuple[int, int, float, int, int, int]] = field(default_factory=list)

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{self.now():7.1f}] {text}", flush=True)

    def wrong(self, text: str) -> None:
        """Note what must not be."""
        self.problems.append(text)
        self.say(f"WRONG: {text}")


class Part:
    """One start of the command, to its end."""

    def __init__(self, config: Path, faults: Path, number: int) -> None:
        self.faults = faults
        self.run = config.parent / "run"
        self.number = number
        self.mark = f"{os.getpid()}-{number}"
        self.began = time.time()
        programs = Path(sys.executable).parent
        names = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"PATH": f"{programs}:{environment['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        port = str(port_to_meet_at())
        self._said = (config.parent / "said").open("ab")
        script = str(Path(__file__).with_name("soak_rank.py"))
        command = [str(programs / "deepspeed"), "--num_gpus", str(RANKS), "--master_port", port, script]
        self.launcher = subprocess.Popen(
            [*command, str(faults), "--config", str(config)],
            cwd=ROOT,
            env=environment | {_MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._ranks: dict[int, psutil.Process] = {}

    @property
    def ended(self) -> bool:
        """Whether the launcher and all that it has started are gone."""
        if self.launcher.poll() is None:
            return False
        self.ranks()
        return not any(_lives(process) for process in self._ranks.values())

    @property
    def running(self) -> bool:
        """Whether its run has begun: from then on a hang is found, and the report is in the run folder."""
        end = _end_of(self.run)
        return end.get("how") == "running" and (self.run / END).stat().st_mtime > self.began

    @property
    def has_trained(self) -> bool:
        """Whether it has taken a step, in a run that is running."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return bool(step_rows(self.run)[-1]["step"] > _end_of(self.run).get("step", 0))
        return False

    def ranks(self) -> dict[int, psutil.Process]:
        """Its ranks, as far as they have started."""
        if len(self._ranks) < RANKS and self.launcher.poll() is None:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(self.launcher.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error, KeyError):
                        if any(word.endswith("soak_rank.py") for word in process.cmdline()[:4]):
                            self._ranks.setdefault(int(process.environ()["RANK"]), process)
        return {rank: process for rank, process in self._ranks.items() if _lives(process)}

    def inflict(self, name: str, rank: int) -> None:
        """Do it."""
        ranks = self.ranks()
        if name in INSIDE:
            partial = self.faults / f".rank-{rank}"
            partial.write_text(name)
            partial.rename(self.faults / f"rank-{rank}")
            return
        if name == "stop file":
            (self.run / "stop").touch()
            return
        if name == "kill launcher":
            self.launcher.kill()
            return
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(name.split()[0])
        number = number or getattr(signal, name.split()[0])
        for index, process in ranks.items():
            if name.endswith("all") or index == rank:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    def left(self) -> list[int]:
        """Processes that should have gone; they are killed."""
        for _ in range(50):
            found = [process for process in psutil.process_iter() if _has(process, self.mark)]
            if not found:
                return []
            time.sleep(0.1)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return [process.pid for process in found]

    def end(self) -> int:
        """Its exit code; whatever still runs is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self._said.close()
        return self.launcher.wait()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark
    except psutil.Error:
        return False


def _end_of(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run / END).read_text()))
    return {}


def _due(fault: Fault | None, soak: Soak) -> bool:
    return fault is not None and fault.name not in GOES_ON and soak.now() - fault.when > OVERDUE


def watch_part(part: Part, soak: Soak, draw: random.Random, next_fault: float) -> float:
    """Hurt a part while it lasts, and look at its memory; returns when the next fault is due."""
    last: Fault | None = None
    at_start = draw.random() < START_SHARE
    sampled = 0.0
    first_step = None
    while not part.ended:
        time.sleep(0.1)
        now = soak.now()
        if now - sampled > SAMPLE_SECONDS:
            sampled = now
            if first_step is None:
                first_step = now if part.running and part.has_trained else None
                continue
            for rank, process in part.ranks().items():
                with contextlib.suppress(psutil.Error):
                    memory, files = process.memory_info().rss, process.num_fds()
                    soak.samples.append((part.number, rank, now - first_step, memory, files, process.num_threads()))
        if _due(last, soak):
            assert last is not None
            soak.wrong(f"part {part.number} had not ended {OVERDUE:.0f} s after {last.name} of rank {last.rank}")
            break
        # One at a time: what became of it is to be known.
        if now < next_fault or now > 60 * soak.options.minutes or (last is not None and last.name not in GOES_ON):
            continue
        begun = first_step is not None
        if len(part.ranks()) < RANKS or not (begun or at_start):
            continue
        name, rank = draw.choice(OUTSIDE + INSIDE if begun else AT_START), draw.randrange(RANKS)
        where = f"step {_last_step(part.run)}" if begun else "the start"
        part.inflict(name, rank)
        last = Fault(name, rank, now, where)
        soak.faults.append(last)
        soak.say(f"part {part.number}, {where}: {name} (rank {rank})")
        next_fault, at_start = now + soak.options.every * draw.uniform(0.5, 1.5), draw.random() < START_SHARE
    code = part.end()
    end = _end_of(part.run)
    if last is not None:
        last.ended, last.how = soak.now(), f"code {code}, {end.get('how')}: {end.get('cause')}"
    if "the run hangs" in str(end.get("cause")):
        caused = last is not None and last.name in HANGS
        soak.hangs_found += caused
        # On a machine that is too busy a step may take as long as the timeout of these runs.
        soak.false_alarms += not caused
    left = part.left()
    if left:
        soak.wrong(f"part {part.number} left the processes {left}")
    soak.say(f"part {part.number} ended with code {code}, {end.get('how')}, step {end.get('step')}: {end.get('cause')}")
    return next_fault


def _last_step(run: Path) -> int:
    """Of the rows that are whole; 0 where there is none, as in a part that begins without a checkpoint."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return step_rows(run)[-1]["step"]
    return 0


def _saved(run: Path) -> str:
    with contextlib.suppress(OSError):
        return max((path.name for path in (run / "checkpoints").glob("step-*")), default="")
    return ""


def soak_run(config: Path, soak: Soak, draw: random.Random, next_fault: float) -> float:
    """Start the command again and again until the run is finished."""
    run, faults = config.parent / "run", config.parent / "faults"
    faults.mkdir()
    idle = 0
    while _end_of(run).get("how") != "finished":
        soak.parts += 1
        before = _saved(run)
        next_fault = watch_part(Part(config, faults, soak.parts), soak, draw, next_fault)
        idle = 0 if _saved(run) > before else idle + 1
        if idle == NO_PROGRESS:
            soak.wrong(f"{idle} parts in a row saved nothing: {(config.parent / 'said').read_text()[-2000:]}")
            break
    return next_fault


def compare(run: Path, quiet: Path, soak: Soak) -> None:
    """See that a run has the losses of the one that nobody disturbed."""
    rows, expected = step_rows(run), step_rows(quiet)
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        soak.wrong(f"{run} has {len(rows)} steps, not {len(expected)}")
        return
    difference = abs(rows[-1]["loss"] - expected[-1]["loss"])
    same = sum(row["loss"] == other["loss"] for row, other in zip(rows, expected, strict=True))
    soak.worst_difference = max(soak.worst_difference, difference)
    soak.say(
        f"run {soak.runs}: final loss {rows[-1]['loss']:.6f}, off by {difference:.1e}; {same}/{len(rows)} the same"
    )
    if difference > TOLERANCE:
        soak.wrong(f"{run}: final loss {rows[-1]['loss']}, not {expected[-1]['loss']}")
    parts = read_history(run)
    if len(parts) < 1 or parts[-1].end is None or parts[-1].end["how"] != "finished":
        soak.wrong(f"{run}: the history does not end with a finished part")


def seconds_of(run: Path) -> float:
    """Time of the steps of a run whose losses count."""
    rows = step_rows(run)
    steps = zip([{"tokens": 0}, *rows], rows, strict=False)
    return sum((row["tokens"] - before["tokens"]) / row["tokens_per_second"] for before, row in steps)


def growth(soak: Soak) -> dict[str, Any]:
    """How much more the ranks hold late than early: within parts, and the last parts against the first."""
    found: dict[str, Any] = {}
    for name, column in (("resident_memory", 3), ("open_files", 4), ("threads", 5)):
        series: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for sample in soak.samples:
            if sample[2] >= SETTLED:
                series.setdefault((sample[0], sample[1]), []).append((sample[2], int(sample[column])))
        within = [
            100 * (values[-1][1] / values[0][1] - 1)
            for values in series.values()
            if values[-1][0] - values[0][0] >= SETTLED
        ]
        settled = [values[0][1] for _, values in sorted(series.items())]
        few = max(1, len(settled) // 4)
        found[name] = {
            "parts_measured": len(within),
            "median_growth_within_parts_percent": round(median(within), 2) if within else None,
            "largest_growth_within_parts_percent": round(max(within), 2) if within else None,
            "last_parts_against_first_percent": round(100 * (median(settled[-few:]) / median(settled[:few]) - 1), 2)
            if settled
            else None,
            "median": median(settled) if settled else None,
        }
    return found


def summary(soak: Soak, quiet_goodput: float) -> dict[str, Any]:
    """What is to be known at the end."""
    ended: dict[str, list[float]] = {}
    for fault in soak.faults:
        if fault.ended is not None and fault.name not in GOES_ON:
            ended.setdefault(fault.name, []).append(fault.ended - fault.when)
    wall = soak.now()
    return {
        "minutes": round(wall / 60, 2),
        "seed": soak.options.seed,
        "runs_finished": soak.runs,
        "parts": soak.parts,
        "faults": len(soak.faults),
        "faults_by_kind": dict(sorted(Counter(fault.name for fault in soak.faults).items())),
        "slowest_end_after_fault_seconds": {name: round(max(times), 1) for name, times in sorted(ended.items())},
        "hangs_found": soak.hangs_found,
        "hangs_reported_without_one": soak.false_alarms,
        "manual_steps": 0 if not soak.problems else None,
        "worst_difference_of_final_loss": soak.worst_difference,
        "steps_kept": soak.steps_kept,
        "seconds_of_steps_kept": round(soak.seconds_kept, 1),
        "goodput": round(soak.seconds_kept / wall, 4),
        "goodput_without_faults": round(quiet_goodput, 4),
        "growth": growth(soak),
        "problems": soak.problems,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="no fault after so many minutes (60)")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two faults, in the mean (30)")
    parser.add_argument("--steps", type=int, default=1500, help="of each run (1500)")
    parser.add_argument("--seed", type=int, default=1, help="decides which faults, and when (1)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="removed at the start (build/soak)")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    changes: dict[str, Any] = {
        "training__steps": options.steps,
        "training__global_batch_size": 16,
        "training__micro_batch_size": 4,
        "model__hidden_size": 64,
        "model__ffn_size": 256,
        "model__sequence_length": 64,
        "adapters__fraction": 0.01,
        "parallel__data": RANKS,
        "parallel__zero_stage": 1,
        "checkpoint__interval": 25,
        "evaluation__interval": 200,
        "run__log_interval": 100,
        "watch__hang_timeout": HANG,
        "watch__first_step_timeout": START,
    }
    corpus = small_corpus(options.folder)
    draw = random.Random(options.seed)
    quiet = Soak(options, time.monotonic())
    path = write_config(options.folder / "quiet", corpus, **changes)
    soak_run(path, quiet, draw, float("inf"))
    if quiet.problems or _last_step(path.parent / "run") == 0:
        print(f"error: the run that nobody disturbs fails: {quiet.problems}", file=sys.stderr)
        return 1
    quiet_goodput = seconds_of(path.parent / "run") / quiet.now()
    soak = Soak(options, time.monotonic())
    next_fault = options.every * draw.uniform(0.5, 1.5)
    while not soak.problems and soak.now() < 60 * options.minutes:
        room = options.folder / f"run-{soak.runs + 1:03d}"
        next_fault = soak_run(write_config(room, corpus, **changes), soak, draw, next_fault)
        if _end_of(room / "run").get("how") == "finished":
            soak.runs += 1
            compare(room / "run", path.parent / "run", soak)
        if (room / "run" / "metrics.jsonl").exists():
            soak.seconds_kept += seconds_of(room / "run")
            soak.steps_kept += len(step_rows(room / "run"))
    result = summary(soak, quiet_goodput)
    (options.folder / "faults.jsonl").write_text("".join(json.dumps(vars(fault)) + "\n" for fault in soak.faults))
    (options.folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
