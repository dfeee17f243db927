"""Pretrain a model described by one JSON file.

deepspeed launch/pretrain.py --config configs/tiny.json
torchrun --nproc_per_node 2 launch/pretrain.py --config configs/tiny.json --set training.steps=50
python launch/pretrain.py --config configs/opt66b.json --dry-run
"""

from __future__ import annotations

import argparse
import shlex
import sys

from slope_dist.errors import EXIT_BAD_INPUT, UserError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one training process; returns its exit code."""
    options = _parse(arguments)
    from slope_dist.parallel import environment

    place = None
    trainer = None
    running = False
    try:
        place = environment.discover()
        from slope_dist.config import derive, dump_config, load_config
        from slope_dist.config.resolve import threads_per_process
        from slope_dist.training.describe import corpus_warning, describe

        config = load_config(options.config, options.set)
        if options.dry_run:
            print(dump_config(config), end="")
            lines = [*describe(config, derive(config)), corpus_warning(config)]
            print("\n".join(line for line in lines if line))
            return 0
        derived = derive(config, place.world_size)
        environment.start(place, threads_per_process(config, place.local_world_size))
        if place.is_first:
            print("\n".join(describe(config, derived)), flush=True)
        from slope_dist.training.guards import RunFailedError
        from slope_dist.training.trainer import Trainer

        try:
            trainer = Trainer(config, place, options.resume)
            if place.is_first and trainer.skipped_checkpoints:
                print("\n".join(f"warning: {line}" for line in trainer.skipped_checkpoints), flush=True)
            if trainer.finished:
                if place.is_first:
                    print(
                        f"this run is finished: step {trainer.step} of {config.training.steps} is in "
                        f"{trainer.last_checkpoint}, metrics in {trainer.folder.metrics}, picture in "
                        f"{trainer.folder.picture}"
                    )
                return 0
            running = True
            trainer.run()
        except RunFailedError as error:
            _say_on_first(place, f"error: {error}")
            _say_how_to_resume(trainer, options, place)
            return EXIT_FAILED
        except KeyboardInterrupt:
            _say_how_to_resume(trainer, options, place)
            return EXIT_INTERRUPTED
        except UserError:
            raise
        except BaseException:
            _say_how_to_resume(trainer, options, place)
            raise
        return 0
    except UserError as error:
        if running and place is not None and not place.is_first:
            # In the loop an error may be one rank's alone.
            print(f"error: rank {place.rank}: {error}", file=sys.stderr, flush=True)
        _say_on_first(place, f"error: {error}")
        if trainer is not None:
            _say_how_to_resume(trainer, options, place)
        return EXIT_BAD_INPUT
    finally:
        environment.stop()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a model with SLoPe.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="JSON file that describes the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one value; repeatable"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default): go on from the newest checkpoint in the run folder; never: refuse one that has any",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the run would be, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # The deepspeed launcher adds it.
    return parser.parse_args(arguments)


def _say_on_first(place: object, text: str) -> None:
    if getattr(place, "is_first", True):
        print(text, file=sys.stderr, flush=True)


def _say_how_to_resume(trainer: object, options: argparse.Namespace, place: object) -> None:
    last = getattr(trainer, "last_checkpoint", None)
    command = ["deepspeed", "launch/pretrain.py", "--config", options.config]
    for change in options.set:
        command += ["--set", change]
    where = f"the last complete checkpoint is {last}; go on" if last else "there is no checkpoint yet; start again"
    _say_on_first(place, f"{where} with: {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
