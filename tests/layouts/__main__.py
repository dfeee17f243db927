"""Runs the layout matrix and prints a row a case; what has passed is not run again until the sources change.

    make test-layouts
    python -m tests.layouts "*tp2*zero3*" "*bf16*"     the cases whose names match
    python -m tests.layouts --list

Exit code 0 if all chosen cases pass (or need more GPUs than there are), 1 if one fails, 2 for a bad command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slope_dist.command_line import EXIT_INTERRUPTED
from tests.layouts.cases import all_cases
from tests.layouts.runner import Runner
from tests.resumable import choose
from tests.runs import small_corpus

FOLDER = Path(__file__).resolve().parents[2] / "build" / "layouts"
"""Ignored by git; removed by `make clean`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="GLOB", help="names of cases to run (all)")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    options = parser.parse_args(arguments)
    cases = choose(all_cases(), options.cases)
    if not cases:
        print(f"error: no case is called {' or '.join(options.cases)}; see --list", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    runner = Runner(FOLDER, small_corpus)
    try:
        return 0 if runner.run(cases) else 1
    except KeyboardInterrupt:
        print("interrupted; what has finished is kept", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    # The module under its own name: ranks find functions by it.
    sys.exit(main())
