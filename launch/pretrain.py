"""Pretrain a model described by one JSON file.

deepspeed launch/pretrain.py --config configs/tiny.json
torchrun --nproc_per_node 2 launch/pretrain.py --config configs/tiny.json --set training.steps=50
python launch/pretrain.py --config configs/opt66b.json --dry-run
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from slope_dist.command_line import Parser
from slope_dist.errors import EXIT_BAD_INPUT, UserError
from slope_dist.output import settle_output


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
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
    parser.add_argument(
        "--accept-steps",
        action="store_true",
        help="another training.steps is meant although the adapters have joined; they stay on",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the run would be, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # The deepspeed launcher adds it.
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one training process; returns its exit code."""
    if os.environ.get("SLOPE_STOP_FILE"):
        # The early signal would kill a rank that is still importing torch. The file stays for `Stopper.listen`.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        options = _parse(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    from slope_dist.training.entry import Request, Resume, dry_run, pretrain

    request = Request(options.config, tuple(options.set), Resume(options.resume, options.accept_steps))
    if options.dry_run:
        return dry_run(request)
    code = pretrain(request)
    settle_output()
    return code


if __name__ == "__main__":
    sys.exit(main())
