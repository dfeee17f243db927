"""From a command line to a run and its exit code: what launch/pretrain.py does."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from slope_dist.command_line import EXIT_INTERRUPTED
from slope_dist.config import derive, dump_config, load_config
from slope_dist.config.resolve import threads_per_process
from slope_dist.errors import EXIT_BAD_INPUT, UserError
from slope_dist.parallel import environment
from slope_dist.parallel.environment import Environment
from slope_dist.training.describe import corpus_warning, describe
from slope_dist.training.guards import RunFailedError

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
    """Run this process's part of a training run; returns its exit code."""
    place: Environment | None = None
    try:
        place = environment.discover()
        config = load_config(request.config, request.changes)
        derived = derive(config, place.world_size)
        summary = describe(config, derived)
        environment.start(place, threads_per_process(config, place.local_world_size))
        _say(place, *summary)
        from slope_dist.training.trainer import Trainer

        trainer = Trainer(config, place, request.resume)
        _say(place, *(f"warning: {line}" for line in trainer.skipped_checkpoints))
        _say(place, *(f"note: {line}" for line in trainer.notes))
        if trainer.finished:
            _say(place, trainer.result())
            return 0
    except UserError as error:
        environment.stop()
        return _refused(error, place)
    except KeyboardInterrupt:
        environment.stop()
        return EXIT_INTERRUPTED
    try:
        trainer.run()
    except RunFailedError as error:
        _complain(place, f"error: {error}")
        _complain(place, how_to_go_on(trainer.last_checkpoint, request, place))
        return EXIT_FAILED
    except UserError as error:
        # In the loop an error may be one rank's alone, so each says its own.
        who = "" if place.is_first else f"rank {place.rank}: "
        print(f"error: {who}{error}", file=sys.stderr, flush=True)
        _complain(place, how_to_go_on(trainer.last_checkpoint, request, place))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        _complain(place, how_to_go_on(trainer.last_checkpoint, request, place))
        return EXIT_INTERRUPTED
    except BaseException:
        _complain(place, how_to_go_on(trainer.last_checkpoint, request, place))
        raise
    finally:
        environment.stop()
    return 0


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
