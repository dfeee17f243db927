"""How a run stands, from its folder alone: what tools/status.py shows.

Nothing is written, and the run is not disturbed: whether somebody holds its lock is asked by taking a shared one for an
instant, which a job that starts at that instant waits out. Nothing here imports torch, so that an answer takes less
than a second, unless a checkpoint's bytes are to be verified.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from slope_dist.errors import UserError
from slope_dist.files import read_bounded
from slope_dist.training.ending import END, HISTORY, LOCK, Part, read_history
from slope_dist.training.status_metrics import Metrics, is_number
from slope_dist.transfer import duration_text

State = Literal["not started", "starting", "running", "finished", "stopped", "failed", "killed", "unclear"]

_CONFIG, _METRICS, _CHECKPOINTS, _WATCH = "config.json", "metrics.jsonl", "checkpoints", "watch"
_STEP_NAME = re.compile(r"step-([0-9]{8,19})")
_MOST_BYTES = 2**26
_MOST_MANIFEST_BYTES = 2**31
_QUIET_STEPS, _QUIET_SECONDS = 20, 120.0
"""A running job that has said nothing for this many steps' time, and this long, may be stuck."""

MEANINGS: dict[State, str] = {
    "not started": "no job has begun in this folder",
    "starting": "a job holds the folder, and has not begun to train",
    "running": "a job trains",
    "finished": "the last step is done",
    "stopped": "a job stopped when it was asked to; start it again to go on",
    "failed": "a job ended with an error",
    "killed": "a job was killed without a word: end.json says running, and nobody holds the lock",
    "unclear": "end.json says running; whether that is so the lock does not tell here",
}


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest checkpoint that looks complete.

    Attributes:
        name: of its folder.
        step: whose state it is.
        bytes: of all its files.
        age_seconds: since its manifest was written.
        verified: whether all bytes have their hashes; None: only the manifest and the files' sizes were looked at.
        problem: what verifying found.
    """

    name: str
    step: int
    bytes: int
    age_seconds: float
    verified: bool | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Goodput:
    """Time in steps that were kept, over wall time.

    Attributes:
        step_seconds: time in training steps whose rows are in metrics.jsonl: steps lost with a job are cut off when the
            next one goes on. Steps that were skipped, evaluation, saving, starting and waiting in a queue do not count.
        wall_seconds: from the first job's start until now; where no job runs, until the last one ended.
        share: the first over the second.
    """

    step_seconds: float
    wall_seconds: float
    share: float


@dataclass(frozen=True)
class Status:
    """How a run stands. None: not known (yet). Times are in seconds, sizes in bytes.

    Attributes:
        folder: the run folder.
        state: what becomes of it; see `MEANINGS`.
        cause: why the last job stopped or failed.
        exit_code: of the last job.
        host, pid, job: where the last job ran: machine, process of rank 0, SLURM's number.
        ranks: how many it had.
        model, layout: from config.json, in words.
        step, steps: done, and of how many.
        tokens: seen so far.
        loss: of the last step.
        mean_loss, mean_of: of the last steps, and of how many.
        evaluation: the last one: step, eval_loss, perplexity, bits_per_byte.
        tokens_per_second, seconds_per_step: median of the last steps.
        mfu: of the last step.
        eta_seconds: until the last step at that speed; only of a running job.
        quiet_seconds: since the last step's row, or since the job's start if that was later.
        phase: "sparse" or "adapters".
        first_adapter_step: at which the adapters join; None where they never do.
        checkpoint: the newest.
        parts: jobs so far: step at its start, start and end time, how it ended and why, host, job.
        restarts: how many followed the first.
        goodput: see `Goodput`.
        warnings: what a person should look at.
    """

    folder: str
    state: State
    cause: str | None = None
    exit_code: int | None = None
    host: str | None = None
    pid: int | None = None
    job: str | None = None
    ranks: int | None = None
    model: str | None = None
    layout: str | None = None
    step: int = 0
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    mean_loss: float | None = None
    mean_of: int = 0
    evaluation: dict[str, Any] | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    mfu: float | None = None
    eta_seconds: float | None = None
    quiet_seconds: float | None = None
    phase: str | None = None
    first_adapter_step: int | None = None
    checkpoint: CheckpointStatus | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0
    goodput: Goodput | None = None
    warnings: list[str] = field(default_factory=list)


class Observer:
    """Looks at one run folder, as often as it is asked to; each look reads what is new.

    Args:
        folder: the run folder.

    Raises:
        UserError: if there is no such folder, or it is not a run's.
    """

    def __init__(self, folder: Path) -> None:
        try:
            names = set(os.listdir(folder))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{folder} cannot be opened: {reason}; give the folder of a run") from error
        if not names & {_CONFIG, _METRICS, END, HISTORY, LOCK}:
            raise UserError(f"{folder} is no run folder: there is no {_CONFIG} in it; give the folder of a run")
        self.folder = folder
        self._metrics = Metrics(folder / _METRICS)
        self._verified: dict[tuple[str, float], str | None] = {}

    def look(self, *, verify: bool = False, now: float | None = None) -> Status:
        """The status of this moment.

        Args:
            verify: read all bytes of the newest checkpoint.
            now: the time, in seconds since 1970; None asks the clock.
        """
        now = time.time() if now is None else now
        warnings: list[str] = []
        end = self._json(END, warnings)
        parts = self._history(warnings)
        self._read_metrics(warnings)
        config = self._json(_CONFIG, warnings)
        step = int(self._metrics.last("step") or 0)
        steps = _number(config, "training", "steps")
        per_step = self._metrics.seconds_per_step()
        quiet = self._quiet(now, parts)
        too_quiet = quiet is not None and quiet > max(_QUIET_SECONDS, _QUIET_STEPS * (per_step or 0.0))
        held = lock_is_held(self.folder / LOCK)
        if held is False and not too_quiet and _text(end, "host") not in (None, socket.gethostname()):
            # Some file systems keep locks to the machine that took them.
            held = None
        state = _state(end, held)
        running = state in ("running", "unclear")
        quiet = quiet if running else None
        if quiet is not None and too_quiet:
            took = f"; the last ones took {duration_text(per_step)} each" if per_step else ""
            warnings.append(f"no step for {duration_text(quiet)}{took}")
        if state == "killed":
            warnings.append(MEANINGS["killed"])
        checkpoint = self._checkpoint(now, verify, warnings)
        self._warn_of_metrics(warnings)
        warnings += self._hang_reports()
        mean = self._metrics.mean_loss()
        return Status(
            folder=str(self.folder),
            state=state,
            cause=_text(end, "cause"),
            exit_code=_whole(end, "exit_code"),
            host=_text(end, "host"),
            pid=_whole(end, "pid"),
            job=_text(end, "job"),
            ranks=_whole(end, "ranks"),
            model=_model(config),
            layout=_layout(config),
            step=step,
            steps=None if steps is None else int(steps),
            tokens=None if (tokens := self._metrics.last("tokens")) is None else int(tokens),
            loss=self._metrics.last("loss"),
            mean_loss=None if mean is None else mean[0],
            mean_of=0 if mean is None else mean[1],
            evaluation=self._evaluation(),
            tokens_per_second=self._speed(per_step),
            seconds_per_step=per_step,
            mfu=self._metrics.last("mfu"),
            eta_seconds=per_step * max(0, steps - step) if running and per_step and steps is not None else None,
            quiet_seconds=quiet,
            phase=_text(self._metrics.steps[-1] if self._metrics.steps else None, "phase"),
            first_adapter_step=None if config is None else self._first_adapter_step(),
            checkpoint=checkpoint,
            parts=[_part(part) for part in parts],
            restarts=max(0, len(parts) - 1),
            goodput=self._goodput(now, state, parts, end),
            warnings=warnings,
        )

    def _json(self, name: str, warnings: list[str]) -> dict[str, Any] | None:
        """A small file that holds one object; None where it does not."""
        try:
            content = json.loads(read_bounded(self.folder / name, _MOST_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            warnings.append(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}")
            return None
        if not isinstance(content, dict):
            warnings.append(f"{name} cannot be read: it holds no object")
            return None
        return content

    def _history(self, warnings: list[str]) -> list[Part]:
        try:
            return read_history(self.folder)
        except UserError as error:
            warnings.append(str(error))
            return []

    def _read_metrics(self, warnings: list[str]) -> None:
        try:
            self._metrics.read()
        except OSError as error:
            warnings.append(f"{_METRICS} cannot be read: {error.strerror or error}")

    def _evaluation(self) -> dict[str, Any] | None:
        row = self._metrics.evaluation
        if row is None:
            return None
        names = ("step", "eval_loss", "perplexity", "bits_per_byte")
        return {name: row[name] for name in names if is_number(row.get(name))}

    def _speed(self, per_step: float | None) -> float | None:
        step, tokens = self._metrics.last("step"), self._metrics.last("tokens")
        return tokens / step / per_step if per_step and step and tokens is not None else None

    def _quiet(self, now: float, parts: list[Part]) -> float | None:
        times = [self._metrics.last("time"), _seconds(parts[-1].start) if parts else None]
        known = [moment for moment in times if moment is not None]
        return max(0.0, now - max(known)) if known else None

    def _first_adapter_step(self) -> int | None:
        from slope_dist.config import load_config
        from slope_dist.config.resolve import first_adapter_step

        try:
            config = load_config(self.folder / _CONFIG)
        except UserError:
            return None  # Of another version, perhaps: what it says for itself is shown all the same.
        return first_adapter_step(config) if config.adapter_steps else None

    def _checkpoint(self, now: float, verify: bool, warnings: list[str]) -> CheckpointStatus | None:
        folder = self.folder / _CHECKPOINTS
        names: list[str] = []
        with suppress(OSError):
            names = sorted((name for name in os.listdir(folder) if _STEP_NAME.fullmatch(name)), key=_step_of)
        for name in reversed(names):
            try:
                size, written = complete_size(folder / name)
            except (OSError, ValueError) as error:
                warnings.append(f"checkpoint {name} is not complete: {getattr(error, 'strerror', None) or error}")
                continue
            problem = None
            if verify:
                key = name, written
                if key not in self._verified:  # Once, not at each of many looks.
                    self._verified[key] = _verify(folder / name)
                problem = self._verified[key]
            if problem is not None:
                warnings.append(f"checkpoint {name} does not verify: {problem}")
            verified = problem is None if verify else None
            return CheckpointStatus(name, _step_of(name), size, max(0.0, now - written), verified, problem)
        return None

    def _warn_of_metrics(self, warnings: list[str]) -> None:
        metrics = self._metrics
        if metrics.skipped:
            warnings.append(f"{metrics.skipped} steps were skipped: loss or gradients were not finite")
        for row in metrics.straggler.values():
            told = row["straggler"]
            if told.get("slow") is True:
                warnings.append(
                    f"since step {row['step']} rank {told.get('rank')} on {told.get('host')} is slow in "
                    f"{told.get('what')}: score {told.get('score')}"
                )
        if metrics.drift is not None and metrics.drift["drift"].get("tensors"):
            told, shown = metrics.drift["drift"], metrics.drift["drift"].get("shown")
            first = shown[0] if isinstance(shown, list) and shown and isinstance(shown[0], dict) else {}
            warnings.append(
                f"since step {metrics.drift['step']} copies of {told['tensors']} tensors differ, such as "
                f"{first.get('kind')} {first.get('tensor')} on ranks {first.get('ranks')} ({first.get('hosts')})"
            )
        if metrics.save_problem is not None:
            warnings.append(f"at step {metrics.save_problem['step']}: {metrics.save_problem['save_problem']}")
        if metrics.unreadable:
            warnings.append(f"{metrics.unreadable} lines of {_METRICS} are no rows")

    def _hang_reports(self) -> list[str]:
        names: list[str] = []
        with suppress(OSError):
            names = sorted(name for name in os.listdir(self.folder / _WATCH) if "hang" in name)
        return [f"report of a hang: {self.folder / _WATCH / name}" for name in names]

    def _goodput(self, now: float, state: State, parts: list[Part], end: dict[str, Any] | None) -> Goodput | None:
        metrics = self._metrics
        start = _seconds(parts[0].start) if parts else None
        if start is None:
            # A folder from before there was a history: from the first row, which came at the end of its step.
            start = metrics.first_time
        last = metrics.last("time")
        if state in ("running", "unclear", "starting"):
            until = now
        else:
            ended = _seconds(end) if end is not None and state != "killed" else None
            until = max((moment for moment in (last, ended) if moment is not None), default=now)
        if start is None or until <= start:
            return None
        return Goodput(metrics.step_seconds, until - start, min(1.0, metrics.step_seconds / (until - start)))


def lock_is_held(path: Path) -> bool | None:
    """Whether a job holds a run folder's lock; None where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # Shared, so that two who look do not see each other; gone again with the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    finally:
        os.close(descriptor)


def _state(end: dict[str, Any] | None, held: bool | None) -> State:
    how = _text(end, "how")
    if how == "running":
        return {True: "running", False: "killed", None: "unclear"}[held]  # type: ignore[return-value]
    if held:
        return "starting"
    known: dict[str, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed"}
    return known.get(how or "", "not started" if end is None else "unclear")


def complete_size(folder: Path) -> tuple[int, float]:
    """Bytes of a checkpoint, and when its manifest was written; the files' bytes are not read.

    Raises:
        OSError: if a file is missing or cannot be looked at.
        ValueError: if the manifest is not whole or a file has another size.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(read_bounded(path, _MOST_MANIFEST_BYTES))
        files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise ValueError("it has no manifest.json") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its manifest.json is not whole ({error})") from error
    total = 0
    for name, size in files.items():
        try:
            found = os.stat(folder / os.path.basename(name)).st_size
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        if found != size:
            raise ValueError(f"{name} has {found} bytes of {size}")
        total += found
    written = os.stat(path)
    return total + written.st_size, written.st_mtime


def _verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's bytes; None: nothing. Imports torch."""
    from slope_dist.checkpoint import Checkpoint

    try:
        Checkpoint.open(folder)
    except UserError as error:
        return str(error)
    return None


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _seconds(row: dict[str, Any]) -> float | None:
    """The time of a row of history.jsonl, in seconds since 1970."""
    with suppress(ValueError, OverflowError):
        return datetime.strptime(str(row.get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


def _part(part: Part) -> dict[str, Any]:
    end = part.end or {}
    row = {name: part.start.get(name) for name in ("step", "time", "host", "pid", "job", "ranks")}
    row |= {"how": end.get("how"), "end": end.get("time"), "last_step": end.get("step"), "cause": end.get("cause")}
    return {name: value if isinstance(value, str | int | None) else str(value) for name, value in row.items()}


def _text(row: dict[str, Any] | None, name: str) -> str | None:
    value = None if row is None else row.get(name)
    return None if value is None else str(value)


def _whole(row: dict[str, Any] | None, name: str) -> int | None:
    value = None if row is None else row.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(config: dict[str, Any] | None, section: str, name: str) -> float | None:
    inner = None if config is None else config.get(section)
    value = inner.get(name) if isinstance(inner, dict) else None
    return value if is_number(value) else None


def _section(config: dict[str, Any] | None, name: str) -> dict[str, Any]:
    inner = None if config is None else config.get(name)
    return inner if isinstance(inner, dict) else {}


def _model(config: dict[str, Any] | None) -> str | None:
    model = _section(config, "model")
    if not model or config is None:
        return None
    words = [str(model.get("family"))]
    for key, text in (("num_layers", "layers"), ("hidden_size", "wide"), ("sequence_length", "tokens a sample")):
        words.append(f"{model.get(key)} {text}")
    return ", ".join([*words, f"{_section(config, 'sparsity').get('pattern')}", f"{config.get('precision')}"])


def _layout(config: dict[str, Any] | None) -> str | None:
    parallel = _section(config, "parallel")
    if not parallel:
        return None
    engine = str(parallel.get("engine"))
    words = [engine if engine == "fsdp" else f"{engine} ZeRO {parallel.get('zero_stage')}"]
    words += [f"{parallel[key]} {key} ranks" for key in ("tensor", "pipeline") if parallel.get(key) not in (None, 1)]
    return ", ".join([*words, *(["sequence parallel"] if parallel.get("sequence_parallel") is True else [])])
