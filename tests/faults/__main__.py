"""Runs trials of faults and prints a row a kind; goes on where it was stopped, until the sources change.

    make test-faults
    python -m tests.faults --minutes 5                  no trial is begun after five minutes
    python -m tests.faults truncation "fuzzed*"         the kinds whose names match
    python -m tests.faults truncation --only 17         one trial again; what it worked on stays if it fails
    python -m tests.faults --markdown                   the table of what is known; runs nothing
    python -m tests.faults --list

Exit code 0 if no trial that has run failed, 1 if one did, 2 for a bad command line. `rm -r build/faults` forgets all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slope_dist.command_line import EXIT_INTERRUPTED
from tests.faults.kinds import all_kinds
from tests.faults.runner import Kind, Runner
from tests.resumable import choose

FOLDER = Path(__file__).resolve().parents[2] / "build" / "faults"
"""Ignored by git; removed by `make clean`."""


def main(arguments: list[str] | None = None, kinds: Sequence[Kind] | None = None, folder: Path = FOLDER) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    chosen = choose(all_kinds() if kinds is None else kinds, options.kinds)
    if not chosen:
        return _refuse(f"no kind is called {' or '.join(options.kinds)}; see --list")
    if options.list:
        print("\n".join(f"{kind.name} ({kind.trials}): {kind.claim}" for kind in chosen))
        return 0
    runner = Runner(folder, options.seed, options.scale)
    for index in options.only:
        few = [kind.name for kind in chosen if not 0 <= index < runner.trials_of(kind)]
        if few:
            return _refuse(f"{few[0]} has no trial {index}; name one kind and one of its trials, counted from 0")
    if options.markdown:
        print("\n".join(runner.markdown(chosen)))
        return 0
    try:
        good = runner.run_only(chosen, options.only) if options.only else runner.run(chosen, options.minutes)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="GLOB", help="names of kinds to run (all)")
    parser.add_argument("--minutes", type=_positive, help="begin no trial after so many minutes")
    parser.add_argument("--seed", type=int, default=1, help="decides every random choice (1)")
    parser.add_argument("--scale", type=_positive, default=1.0, help="factor on the number of trials (1)")
    parser.add_argument("--only", type=int, action="append", default=[], metavar="N", help="this trial; repeatable")
    parser.add_argument("--markdown", action="store_true", help="print the table of what is known, and run nothing")
    parser.add_argument("--list", action="store_true", help="print names and claims, and run nothing")
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # The module under its own name: ranks find functions by it.
    sys.exit(main())
