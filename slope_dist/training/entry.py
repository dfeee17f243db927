"""From a command line to a run and its exit code: what launch/pretrain.py does."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slope_dist.command_line import EXIT_INTERRUPTED, answer
from slope_dist.config import Config, derive, dump_config, load_config, run_folder
from slope_dist.config.resolve import fit, threads_per_process, world_size
from slope_dist.errors import EXIT_BAD_INPUT, EXIT_STOPPED, UserError, may_pass
from slope_dist.output import tell
from slope_dist.parallel import collectives, environment
from slope_dist.parallel.environment import Environment
from slope_dist.parallel.failure import EXIT_LOST, Peers, in_words, lost_a_peer
from slope_dist.training.control_groups import processor_limit
from slope_dist.training.describe import corpus_warning, describe, describe_alternatives
from slope_dist.training.ending import How, write_end
from slope_dist.training.folder import Resume
from slope_dist.training.guards import RunFailedError
from slope_dist.training.stopping import StopNow, Stopper
from slope_dist.training.watch import Watch

if TYPE_CHECKING:
    from slope_dist.training.trainer import Trainer

EXIT_FAILED = 1


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        config: path of the run's JSON file.
        changes: "section.key=value" each.
        resume: how to treat a folder with checkpoints.
        script: the program that was started, for the command to go on with.
    """

    config: str
    changes: Sequence[str] = field(default_factory=tuple)
    resume: Resume = field(default_factory=Resume)
    script: str = "launch/pretrain.py"


def dry_run(request: Request) -> int:
    """Print the resolved config and what follows from it; no process group, nothing written."""

    def tell() -> None:
        # A launcher may have started several processes; one of them speaks.
        place = environment.discover()
        config = load_config(request.config, request.changes)
        lines = [
            dump_config(config).rstrip(),
            *describe(config, derive(config)),
            *describe_alternatives(config),
            corpus_warning(config),
        ]
        if place.is_first:
            print("\n".join(line for line in lines if line))

    return answer(tell)


def pretrain(request: Request) -> int:
    """Run this process's part of a training run; returns its exit code.

    Under NCCL a run of several ranks that fails ends the process itself (see `Peers.leave`).
    """
    place: Environment | None = None
    stopper: Stopper | None = None
    try:
        place = environment.discover()
        stopper = Stopper(place)
        stopper.listen()
        config = load_config(request.config, request.changes)
        config, chosen = _fit(config, place)
        summary = [*chosen, *describe(config, derive(config, place.world_size))]
        try:
            environment.start(
                place,
                threads_per_process(config, environment.ranks_on_these_cores(place), processor_limit()),
                deterministic=config.training.deterministic,
            )
        except UserError as error:
            environment.stop()
            # What is wrong may be wrong on one machine alone, so one rank of each says it.
            return _refused(error, None if place.local_rank == 0 else place)
    except UserError as error:
        return _refused(error, place)
    except environment.MeetingError as error:
        assert place is not None
        tell(f"error: rank {place.rank}: {error}", sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        environment.stop()
        return EXIT_INTERRUPTED
    except StopNow as error:
        # Whichever ranks the signal has reached. SIGTERM is also what launchers end the others of a failed rank with,
        # and what the job's state tells by itself.
        if str(error) != "SIGTERM":
            write_end(None, "stopped", step=0, checkpoint=None, exit_code=EXIT_STOPPED, cause=str(error))
        environment.stop()
        return EXIT_STOPPED
    run = _Run(request, place, stopper)
    try:
        run.train(config, summary)
    except BaseException as error:
        return run.fail(error)
    return run.finish()


class _Run:
    """A run from the moment its process group exists: from here on a rank that fails ends the others."""

    def __init__(self, request: Request, place: Environment, stopper: Stopper) -> None:
        self.request = request
        self.place = place
        self.stopper = stopper
        self.peers: Peers | None = None
        self.watch: Watch | None = None
        self.trainer: Trainer | None = None

    def train(self, config: Config, summary: list[str]) -> None:
        """Train to the last step, or find that nothing is left to do."""
        self.peers = Peers(self.place, self.last_words)
        command = command_to_go_on(self.request, self.place)
        self.watch = Watch(config.watch, self.place, Path(run_folder(config)), command)
        _say(self.place, *summary)
        from slope_dist.training.trainer import Trainer

        trainer = Trainer(config, self.place, self.request.resume, self.stopper)
        _say(self.place, *(f"warning: {line}" for line in trainer.skipped_checkpoints))
        _say(self.place, *(f"note: {line}" for line in trainer.notes))
        self.trainer = trainer
        if trainer.finished:
            _say(self.place, trainer.result())
            return
        self.watch.own_folder()
        if self.place.is_first:
            self._write_end("running", code=None, cause=None)
        trainer.run()

    def last_words(self, cause: str) -> str:
        """What to say below the error of a run that has lost a rank; called by the rank that says it."""
        self._write_end("failed", EXIT_LOST, cause)
        return self._how_to_go_on()

    def finish(self) -> int:
        """Leave together with the others."""
        code, stopped = 0, "" if self.trainer is None else self.trainer.stopped
        if stopped:
            code = EXIT_STOPPED
            _say(self.place, self._how_to_go_on())
        if self.place.is_first:
            self._write_end("stopped" if stopped else "finished", code, stopped or None)
        if stopped:
            # Launchers kill the others when the first rank leaves with this code, so not before that is written.
            with suppress(RuntimeError):
                collectives.agree(None)
        if self.peers is not None:
            self.peers.part()
        environment.stop()
        self._end_watch()
        return code

    def fail(self, error: BaseException) -> int:
        """Tell the others, say the cause if that is for this rank to do, and leave; returns the exit code."""
        peers = self.peers
        if peers is not None and lost_a_peer(error) and peers.lose(in_words(error)):
            code = peers.leave(EXIT_LOST)
            self._end_watch()
            return code
        rank = "" if self.place.is_first else f"rank {self.place.rank}: "
        code = EXIT_FAILED
        how: How = "failed"
        temporary = False
        if isinstance(error, UserError | RunFailedError):
            cause, line = str(error), f"error: {rank}{error}"
            code = EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED
            temporary = may_pass(error)
        elif isinstance(error, KeyboardInterrupt):
            # At the terminal all ranks get it, and who pressed the keys knows.
            cause, line = "interrupted", f"{rank}interrupted" if rank else ""
            code = EXIT_INTERRUPTED
        elif isinstance(error, StopNow):
            # Its name alone is what a job's script decides by.
            cause, line = str(error), f"stopped by {error} before the first step"
            code, how = EXIT_STOPPED, "stopped"
        else:
            cause = in_words(error)
            line = f"error: {f'rank {self.place.rank} failed: ' if self.place.world_size > 1 else ''}{cause}"
        shared = isinstance(error, UserError | RunFailedError | KeyboardInterrupt | StopNow)
        if peers is None or peers.fail(cause, shared=shared):
            lines = [line]
            if peers is None or peers.is_to_blame:
                lines += [] if shared else [traceback.format_exc().rstrip()]
                lines += [self._how_to_go_on()]
                self._write_end(how, code, cause, temporary=temporary)
            tell("\n".join(text for text in lines if text), sys.stderr)
        if peers is not None:
            code = peers.leave(code)
        else:
            environment.stop()
        self._end_watch()
        return code

    def _end_watch(self) -> None:
        if self.watch is not None:
            self.watch.close()

    def _how_to_go_on(self) -> str:
        """Empty before the trainer stands: what could be gone on from is not known yet."""
        if self.trainer is None:
            return ""
        return how_to_go_on(self.trainer.newest_complete(), self.request, self.place)

    def _write_end(self, how: How, code: int | None, cause: str | None, *, temporary: bool = False) -> None:
        """In the job's own file alone before the trainer stands: the folder may be another run's.

        So also where nothing was left to do: how the run has ended stands there already.
        """
        trainer = None if self.trainer is None or self.trainer.finished else self.trainer
        folder = None if trainer is None else trainer.folder
        checkpoint = None if trainer is None else trainer.newest_complete()
        write_end(
            None if folder is None else folder.path,
            how,
            step=0 if self.trainer is None else self.trainer.step,
            trained=0 if self.trainer is None else self.trainer.step - self.trainer.first_step + 1,
            checkpoint=None if checkpoint is None else checkpoint.name,
            damaged=[] if folder is None else sorted(folder.damaged),
            exit_code=code,
            cause=cause,
            temporary=temporary,
            ranks=self.place.world_size,
        )


def _fit(config: Config, place: Environment) -> tuple[Config, list[str]]:
    """The config in the layout that the ranks fit, and what to say of it; for want of ranks also why there are few."""
    cause = environment.why_so_few(place) if place.world_size < world_size(config) else ""
    try:
        config, chosen = fit(config, place.world_size)
    except UserError as error:
        raise UserError(f"{error}; {cause}" if cause else str(error)) from error
    return config, [chosen, *([f"warning: {cause}"] if cause else [])] if chosen else []


def how_to_go_on(last_checkpoint: object, request: Request, place: Environment) -> str:
    """The last complete checkpoint and the command, as this run was launched, that goes on from it."""
    where = "there is no checkpoint yet; start again"
    if last_checkpoint is not None:
        where = f"the last complete checkpoint is {last_checkpoint}; go on"
    return f"{where} with: {command_to_go_on(request, place)}"


def command_to_go_on(request: Request, place: Environment) -> str:
    """The command as this run was launched."""
    command = [request.script, "--config", request.config]
    for change in request.changes:
        command += ["--set", change]
    if request.resume.accept_steps:
        command.append("--accept-steps")
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
    return " ".join(part if part.startswith("(") else shlex.quote(part) for part in [*launcher, *command])


def _refused(error: UserError, place: Environment | None) -> int:
    # Before the rank is known, or where reading it failed, every process speaks for itself.
    if place is None or place.is_first:
        tell(f"error: {error}", sys.stderr)
        details = {"step": 0, "checkpoint": None, "exit_code": EXIT_BAD_INPUT, "cause": str(error)}
        write_end(None, "failed", temporary=may_pass(error), **details)
    return EXIT_BAD_INPUT


def _say(place: Environment, *lines: str) -> None:
    if place.is_first and lines:
        tell("\n".join(lines))
