"""From a command line to a run and its exit code: what launch/pretrain.py does."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slope_dist.command_line import EXIT_INTERRUPTED
from slope_dist.config import Config, Derived, derive, dump_config, load_config
from slope_dist.config.resolve import threads_per_process, world_size
from slope_dist.errors import EXIT_BAD_INPUT, UserError
from slope_dist.parallel import environment
from slope_dist.parallel.environment import Environment
from slope_dist.parallel.failure import EXIT_LOST, Peers, in_words, lost_a_peer
from slope_dist.training.describe import corpus_warning, describe
from slope_dist.training.guards import RunFailedError

if TYPE_CHECKING:
    from slope_dist.training.trainer import Trainer

EXIT_FAILED = 1


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        config: path of the run's JSON file.
        changes: "section.key=value" each.
        resume: "auto" or "never".
        script: the program that was started, for the command to go on with.
    """

    config: str
    changes: Sequence[str] = field(default_factory=tuple)
    resume: str = "auto"
    script: str = "launch/pretrain.py"


def dry_run(request: Request) -> int:
    """Print the resolved config and what follows from it; no process group, nothing written."""
    try:
        # A launcher may have started several processes; one of them speaks.
        place = environment.discover()
        config = load_config(request.config, request.changes)
        lines = [dump_config(config).rstrip(), *describe(config, derive(config)), corpus_warning(config)]
    except UserError as error:
        return _refused(error, None)
    if place.is_first:
        print("\n".join(line for line in lines if line))
    return 0


def pretrain(request: Request) -> int:
    """Run this process's part of a training run; returns its exit code.

    Under NCCL a run of several ranks that fails ends the process itself (see `Peers.leave`).
    """
    place: Environment | None = None
    try:
        place = environment.discover()
        config = load_config(request.config, request.changes)
        summary = describe(config, _derive(config, place))
        try:
            environment.start(place, threads_per_process(config, place.local_world_size))
        except UserError as error:
            environment.stop()
            # What is wrong may be wrong on one machine alone, so one rank of each says it.
            return _refused(error, None if place.local_rank == 0 else place)
    except UserError as error:
        return _refused(error, place)
    except KeyboardInterrupt:
        environment.stop()
        return EXIT_INTERRUPTED
    run = _Run(request, place)
    try:
        run.train(config, summary)
    except BaseException as error:
        return run.fail(error)
    return run.finish()


class _Run:
    """A run from the moment its process group exists: from here on a rank that fails ends the others."""

    def __init__(self, request: Request, place: Environment) -> None:
        self.request = request
        self.place = place
        self.peers: Peers | None = None
        self.trainer: Trainer | None = None

    def train(self, config: Config, summary: list[str]) -> None:
        """Train to the last step, or find that nothing is left to do."""
        self.peers = Peers(self.place, self.advice)
        _say(self.place, *summary)
        from slope_dist.training.trainer import Trainer

        trainer = Trainer(config, self.place, self.request.resume)
        _say(self.place, *(f"warning: {line}" for line in trainer.skipped_checkpoints))
        _say(self.place, *(f"note: {line}" for line in trainer.notes))
        if trainer.finished:
            _say(self.place, trainer.result())
            return
        self.trainer = trainer
        trainer.run()

    def advice(self) -> str:
        """How to go on. Empty before the trainer stands: it is not known yet what could be gone on from."""
        return "" if self.trainer is None else how_to_go_on(self.trainer.last_checkpoint, self.request, self.place)

    def finish(self) -> int:
        """Leave together with the others."""
        if self.peers is not None:
            self.peers.part()
        environment.stop()
        return 0

    def fail(self, error: BaseException) -> int:
        """Tell the others, say the cause if that is for this rank to do, and leave; returns the exit code."""
        peers = self.peers
        if peers is not None and lost_a_peer(error) and peers.lose(in_words(error)):
            return peers.leave(EXIT_LOST)
        rank = "" if self.place.is_first else f"rank {self.place.rank}: "
        if isinstance(error, UserError | RunFailedError):
            cause, line = str(error), f"error: {rank}{error}"
        elif isinstance(error, KeyboardInterrupt):
            # At the terminal all ranks get it, and who pressed the keys knows.
            cause, line = "interrupted", f"{rank}interrupted" if rank else ""
        else:
            cause = in_words(error)
            line = f"error: {f'rank {self.place.rank} failed: ' if self.place.world_size > 1 else ''}{cause}"
        shared = isinstance(error, UserError | RunFailedError | KeyboardInterrupt)
        if peers is None or peers.fail(cause, shared=shared):
            lines = [line]
            if peers is None or peers.is_to_blame:
                lines += [] if shared else [traceback.format_exc().rstrip()]
                lines += [self.advice()]
            print("\n".join(text for text in lines if text), file=sys.stderr, flush=True)
        code = EXIT_FAILED
        if isinstance(error, UserError):
            code = EXIT_BAD_INPUT
        elif isinstance(error, KeyboardInterrupt):
            code = EXIT_INTERRUPTED
        if peers is not None:
            return peers.leave(code)
        environment.stop()
        return code


def _derive(config: Config, place: Environment) -> Derived:
    """What follows from the config for the ranks that are there; a refusal for want of ranks says why there are few."""
    try:
        return derive(config, place.world_size)
    except UserError as error:
        cause = environment.why_so_few(place) if place.world_size < world_size(config) else ""
        raise UserError(f"{error}; {cause}" if cause else str(error)) from error


def how_to_go_on(last_checkpoint: object, request: Request, place: Environment) -> str:
    """The last complete checkpoint and the command, as this run was launched, that goes on from it."""
    command = [request.script, "--config", request.config]
    for change in request.changes:
        command += ["--set", change]
    if place.world_size != place.local_world_size and place.launcher != "none":
        launcher = ["(the same launcher and nodes)"]
    elif place.launcher == "none":
        launcher = [sys.executable]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", str(place.world_size)]
    elif place.launcher == "srun":
        launcher = ["srun", "--ntasks", str(place.world_size), sys.executable]
    else:
        launcher = ["deepspeed", "--num_gpus", str(place.world_size)]
    shown = " ".join(part if part.startswith("(") else shlex.quote(part) for part in [*launcher, *command])
    where = "there is no checkpoint yet; start again"
    if last_checkpoint is not None:
        where = f"the last complete checkpoint is {last_checkpoint}; go on"
    return f"{where} with: {shown}"


def _refused(error: UserError, place: Environment | None) -> int:
    _complain(place, f"error: {error}")
    return EXIT_BAD_INPUT


def _complain(place: Environment | None, text: str) -> None:
    # Before the rank is known, or where reading it failed, every process speaks for itself.
    if place is None or place.is_first:
        print(text, file=sys.stderr, flush=True)


def _say(place: Environment, *lines: str) -> None:
    if place.is_first and lines:
        print("\n".join(lines), flush=True)
