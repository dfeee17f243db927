"""Whether a job goes on: asked by launch/slurm/pretrain.sbatch before and after each part of a run.

    python -m slope_dist.cluster.requeue before --journal FILE --end FILE -- --config configs/tiny.json ...
    python -m slope_dist.cluster.requeue nodes --nodes 13 --ranks 8 -- --config configs/tiny.json ...
    python -m slope_dist.cluster.requeue after --journal FILE --end FILE --code 1 --job running --most 5

The first and the last print one line, the reason, and say the rest by their exit codes: 0 start, or go on (requeue); 3
there is nothing more to do; 4 give up; 5 somebody has asked for the end. Any other is an error, after which nothing is
started. The second prints how many of the nodes to use.

What counts is what the run has written into the end file, not the exit codes of launchers. A part that was asked to
make room (the early signal, preemption) goes on, as long as one in `IDLE` leaves a new checkpoint. A part that failed
goes on at most `most` times, and not after `STUCK` failures in a row that left no new checkpoint. A part that was
refused (exit code 2) for what will not pass by itself ends the chain, since the next one would end alike; but not where
this chain has run before: what ran once is in order, so that a machine or a file system is not, and the refusal is a
failure like others. What SLURM starts again by itself, as it does when a node has failed, goes on and is not counted.
The journal keeps one line a part, of one job or of all elements of an array. An end file that is still there before a
part is of one whose script was killed, with its node or by SLURM, before it could ask.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from slope_dist.command_line import Parser, path_argument
from slope_dist.config import Config, load_config, run_folder
from slope_dist.config.resolve import fit
from slope_dist.errors import EXIT_BAD_INPUT, UserError, may_pass
from slope_dist.files import read_bounded
from slope_dist.output import visible

Verdict = Literal["go on", "done", "give up", "stop"]
EXIT_CODES: dict[Verdict, int] = {"go on": 0, "done": 3, "give up": 4, "stop": 5}

STUCK = 2
"""Failures in a row without a new checkpoint after which a run is given up: the first may be a machine's."""

IDLE = 4
"""Parts in a row, however they ended, without a new checkpoint after which a run is given up that only makes room."""

ROOM = ("SIGUSR1", "its job script")
"""Why a run stops that is only to make room: slope_dist.training.stopping has all the reasons."""

_LOST_LAUNCHER = "the end of its launcher"
_NOT_STARTED = (EXIT_BAD_INPUT, 126, 127)
"""What launchers and shells return for a wrong command line and for a program that is not there."""

_MAX_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a run, as the journal keeps it.

    Attributes:
        verdict: what was decided after it.
        reason: why, in one line.
        counted: whether it is one of the failures of which there may be a limited number.
        checkpoint: step of the newest checkpoint then; None if there was none.
    """

    verdict: Verdict
    reason: str
    counted: bool = False
    checkpoint: int | None = None


def decide(end: dict[str, Any] | None, code: int, job: str, earlier: Sequence[Part], most: int) -> Part:
    """Return what follows from how a part has ended.

    Args:
        end: what the run wrote into the end file; None if nothing.
        code: exit code of its launcher.
        job: what SLURM says of the job: "running", "preempted", "requeued" (by SLURM itself), "held" (the same,
            and not started before it is released), "lost" (with a node, and not requeued), or "ending" (cancelled, or
            out of time).
        earlier: the parts before it.
        most: failures after which the run still goes on.
    """
    end = end or {}
    how, cause, step = end.get("how"), _text(end.get("cause")), end.get("step", 0)
    newest = _newest_checkpoint(end)
    saved = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"

    def part(verdict: Verdict, reason: str, *, counted: bool = False) -> Part:
        return Part(verdict=verdict, reason=reason, counted=counted, checkpoint=newest)

    if how == "finished" or (not end and code == 0):
        return part("done", f"the run is finished after step {step}" if end else "nothing was left to do")
    refused = end.get("exit_code") == EXIT_BAD_INPUT
    not_started = not end and code in _NOT_STARTED
    ran = _has_run(end, earlier)
    if refused and end.get("temporary") is not True and not ran:
        return part("give up", f"the run was refused, and would be again: {cause}")
    if not_started and not ran:
        return part("give up", f"the run could not be started (exit code {code}), and could not again")
    if job == "preempted":
        return part("go on", f"the job is being preempted; {saved}")
    if job == "requeued":
        return part("go on", f"SLURM took the job back, as when a node fails, and starts it again by itself; {saved}")
    if job == "held":
        return part("go on", f"SLURM took the job back, and holds it until `scontrol release`; {saved}")
    if job == "lost":
        return part("done", f"a node failed, and SLURM does not requeue this job; {saved}; submit it again to go on")
    if job != "running":
        return part("done", f"the job was cancelled or is out of time; {saved}; submit it again to go on")
    if how == "stopped" and cause in ROOM:
        made_room = part("go on", f"stopped by {cause} after step {step}; {saved}")
        if _idle([*earlier, made_room]) >= IDLE:
            return part(
                "give up",
                f"stopped by {cause} after step {step}; {IDLE} parts in a row have left no new checkpoint: the time "
                f"limit, less that of the early signal, is too short for a start and a step; {saved}",
            )
        return made_room
    if how == "stopped" and cause != _LOST_LAUNCHER:
        return part("stop", f"stopped by {cause} after step {step}, as somebody asked for; {saved}")
    if not_started:
        failure = f"the run could not be started (exit code {code}), though it could before"
    elif not end:
        failure = f"the run ended before it could say why (exit code {code})"
    elif how == "running":
        failure = f"the run was killed without a word (exit code {code})"
    elif refused and ran:
        failure = f"the run was refused, though it has run before, as if a machine or a file system failed: {cause}"
    else:
        failure = f"the run failed after step {step}: {cause}"
    failed = part("go on", f"{failure}; {saved}", counted=True)
    failures, stuck = _count([*earlier, failed])
    if stuck >= STUCK:
        return part(
            "give up", f"{failure}; {stuck} failures in a row have left no new checkpoint; {saved}", counted=True
        )
    if failures > most:
        return part(
            "give up", f"{failure}; it has failed {failures} times, and may {most} times; {saved}", counted=True
        )
    return part("go on", f"{failure}; failure {failures} of at most {most}; {saved}", counted=True)


def _has_run(end: dict[str, Any], earlier: Sequence[Part]) -> bool:
    """Whether this chain has trained: here, or in a part that left a checkpoint; its config and its data are in order.

    A run names a folder, and so a checkpoint, only once it stands there as its own.
    """
    trained = end.get("trained")
    return (isinstance(trained, int) and trained > 0) or any(part.checkpoint is not None for part in earlier)


def _count(parts: Sequence[Part]) -> tuple[int, int]:
    """All failures, and those at the end of the row that have left no new checkpoint."""
    failures, stuck = 0, 0
    for part, progress in zip(parts, _progress(parts), strict=True):
        failures += part.counted
        stuck = 0 if progress else stuck + part.counted
    return failures, stuck


def _idle(parts: Sequence[Part]) -> int:
    """Parts at the end of the row that have left no new checkpoint."""
    idle = 0
    for progress in _progress(parts):
        idle = 0 if progress else idle + 1
    return idle


def _progress(parts: Sequence[Part]) -> Iterator[bool]:
    """Whether each part has left a new checkpoint: of another step, since a run goes on before one that was damaged."""
    last = None
    for part in parts:
        yield part.checkpoint not in (None, last)
        last = last if part.checkpoint is None else part.checkpoint


def _newest_checkpoint(end: dict[str, Any]) -> int | None:
    """Step of the newest checkpoint that the run has not found damaged: in the folder it named, or named itself."""
    names = [_text(end.get("checkpoint"))]
    if isinstance(end.get("folder"), str):
        with contextlib.suppress(OSError):
            # A folder has this name only once it is complete.
            names += [path.name for path in (Path(end["folder"]) / "checkpoints").iterdir()]
    damaged = end["damaged"] if isinstance(end.get("damaged"), list) else []
    steps = [
        int(found[1]) for name in names if name not in damaged and (found := re.fullmatch(r"step-(\d{1,18})", name))
    ]
    return max(steps, default=None)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def before(journal: Path, end_file: Path, arguments: Sequence[str]) -> Part | None:
    """Return why a part need not be started; None if it is to be.

    Args:
        journal: that of the job.
        end_file: how a part has ended of which the journal does not know yet; it need not exist.
        arguments: of launch/pretrain.py.

    Raises:
        UserError: if the config cannot be a run, or not be read by a chain that has not run yet, or if the journal
            cannot be written.
    """
    parts = read_journal(journal)
    if parts and parts[-1].verdict in ("give up", "stop"):
        return Part(verdict=parts[-1].verdict, reason=f"an earlier part has ended the chain: {parts[-1].reason}")
    unknown = _read_object(end_file)
    if unknown is not None:
        # Its script would have removed the file.
        part = decide(unknown, 1, "requeued", parts, 0)
        parts.append(part)
        write_journal(journal, part)
        if part.verdict == "give up":
            return part
        print(visible(f"{part.verdict}: the part before: {part.reason}"), flush=True)
    try:
        config = _config(arguments)
        if config is None:
            return None
        folder = Path(run_folder(config))
        end = _read_object(folder / "end.json") or {}
    except UserError as error:
        gone = isinstance(error.__cause__, OSError) and _has_run({}, parts)
        if may_pass(error) or gone:
            # A file server in trouble: the run says so, and after it such a failure is counted.
            return None
        raise
    step = end.get("step")
    if end.get("how") == "finished" and isinstance(step, int) and step >= config.training.steps:
        return Part(verdict="done", reason=f"the run in {folder} is finished after step {step}")
    return None


def nodes_to_use(nodes: int, ranks: int, arguments: Sequence[str]) -> int:
    """Return the most nodes, of those that are there, whose ranks fit some layout of the run.

    All of them where the config has no `parallel.alternatives`, where none fits, or where it cannot be a run: what
    `before` has let pass, the run itself says, and is counted.

    Args:
        nodes: of the job.
        ranks: on each of them.
        arguments: of launch/pretrain.py.
    """
    try:
        config = _config(arguments)
    except UserError:
        return nodes
    if config is not None and config.parallel.alternatives:
        for some in range(nodes, 0, -1):
            with contextlib.suppress(UserError):
                fit(config, some * ranks)
                return some
    return nodes


def _config(arguments: Sequence[str]) -> Config | None:
    """The config that a run is given; None if it is given none, which launch/pretrain.py says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[])
    options, _ = parser.parse_known_args(arguments)
    return None if options.config is None else load_config(options.config, options.set)


def read_journal(path: Path) -> list[Part]:
    """Return the parts in a journal; none where there is no file. A line that a kill cut short is left out."""
    parts = []
    for line in _read(path).splitlines():
        try:
            parts.append(Part(**{key: value for key, value in json.loads(line).items() if key != "time"}))
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
    return parts


def write_journal(path: Path, part: Part) -> None:
    """Add a part to a journal.

    Raises:
        UserError: if it cannot be written: parts that are not counted could be repeated for ever.
    """
    try:
        with path.open("a") as file:
            file.write(f"\n{json.dumps({'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), **asdict(part)})}\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; so nothing is requeued") from error


def _read(path: Path) -> str:
    try:
        return read_bounded(path, _MAX_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question; returns the exit code."""
    parser = Parser(__doc__)
    questions = parser.add_subparsers(dest="question", required=True)
    first = questions.add_parser("before", help="before a part: is there anything to do?")
    first.add_argument("--journal", type=path_argument, required=True)
    first.add_argument(
        "--end", type=path_argument, required=True, help="where an earlier part may have said how it ended"
    )
    first.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of launch/pretrain.py")
    between = questions.add_parser("nodes", help="how many of the job's nodes fit a layout of the run?")
    between.add_argument("--nodes", type=int, required=True)
    between.add_argument("--ranks", type=int, required=True, help="on each node")
    between.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of launch/pretrain.py")
    second = questions.add_parser("after", help="after a part: does the job go on?")
    second.add_argument("--journal", type=path_argument, required=True)
    second.add_argument("--end", type=path_argument, required=True, help="what the run has written to SLOPE_END_FILE")
    second.add_argument("--code", type=int, required=True, help="exit code of the launcher")
    second.add_argument(
        "--job", choices=("running", "preempted", "requeued", "held", "lost", "ending"), default="running"
    )
    second.add_argument("--most", type=int, default=5, help="failures after which the run still goes on")
    try:
        options = parser.parse_args(arguments)
        rest = getattr(options, "rest", [])
        rest = rest[1:] if rest[:1] == ["--"] else rest
        if options.question == "nodes":
            print(nodes_to_use(options.nodes, options.ranks, rest), flush=True)
            return 0
        if options.question == "before":
            part = before(options.journal, options.end, rest)
            if part is None:
                return EXIT_CODES["go on"]
        else:
            earlier = read_journal(options.journal)
            part = decide(_read_object(options.end), options.code, options.job, earlier, options.most)
            write_journal(options.journal, part)
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(visible(f"{part.verdict}: {part.reason}"), flush=True)
    return EXIT_CODES[part.verdict]


if __name__ == "__main__":
    sys.exit(main())
