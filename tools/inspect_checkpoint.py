"""What a checkpoint holds, whether it is whole, and where it differs from another.

    python tools/inspect_checkpoint.py runs/tiny
    python tools/inspect_checkpoint.py runs/tiny/checkpoints/step-00000160 --verify
    python tools/inspect_checkpoint.py runs/tiny --hashes
    python tools/inspect_checkpoint.py runs/tiny --diff runs/other

DIR is a checkpoint, or a run folder or its checkpoints folder: then the newest that verifies. The layout that wrote it
does not matter, and memory does not grow with it. Nothing is written.

Without --hashes or --diff, what it holds: sizes, and of each layer's weight what was measured. "kept" is the share of
the entries that the metadata names, "column mask" that of W^{R,C} where it is state, "zeros" the share of the stored
entries that are exactly 0.

exit codes:
  0  done
  1  the checkpoint is damaged; with --diff, also: a logical tensor differs
  2  the command line is wrong, or there is no such folder or no checkpoint in it, or it may not be read
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slope_dist.checkpoint import Checkpoint, CheckpointError
from slope_dist.checkpoint.comparison import compare
from slope_dist.checkpoint.inspection import (
    count_totals,
    hash_lines,
    hash_of_all,
    logical_hashes,
    measure_layers,
    open_folder,
)
from slope_dist.checkpoint.report import Line, comparison, comparison_json, print_lines, report, report_json, to_json
from slope_dist.checkpoint.validation import check_state
from slope_dist.command_line import Parser, answer, path_argument
from slope_dist.output import visible
from slope_dist.transfer import Transfer

EXIT_DAMAGED = 1
EXIT_DIFFERENT = 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown or missing or contradicts another.
    """
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", type=path_argument, metavar="DIR", help="checkpoint, checkpoints folder or run folder"
    )
    parser.add_argument(
        "--verify", action="store_true", help="first hash every file and check all metadata and every number"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--diff",
        type=path_argument,
        metavar="OTHER",
        help="instead, what differs from OTHER, which is found as DIR is; relative: norm of the difference over that "
        "of OTHER's tensor",
    )
    instead.add_argument(
        "--hashes",
        action="store_true",
        help="instead, SHA-256 of each logical tensor (dtype, shape, elements; no layout), and one over these lines",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, tell: Callable[[int], None]) -> None:
    """Look at the checkpoint, `tell` the exit code if it is not 0, and print what was asked for."""
    checkpoint, skipped = _open(options.folder, options.verify)
    content: dict[str, Any] = {"path": str(checkpoint.path), "step": checkpoint.step, "skipped": skipped}
    lines: list[Line]
    if options.diff is not None:
        other, skipped_there = _open(options.diff, options.verify)
        found = compare(checkpoint, other, _transfer("comparing"))
        if not found.equal:
            tell(EXIT_DIFFERENT)
        content |= {"other": str(other.path), "other_skipped": skipped_there, **comparison_json(found)}
        lines = [f"here: {checkpoint.path}", f"there: {other.path}", *comparison(found)]
    elif options.hashes:
        hashes = logical_hashes(checkpoint, _transfer("hashing tensors"))
        content |= {"hashes": hashes, "all": hash_of_all(hashes)}
        lines = [*hash_lines(hashes).splitlines(), f"{hash_of_all(hashes)}  all {len(hashes)}"]
    else:
        totals, layers = count_totals(checkpoint), measure_layers(checkpoint, _transfer("reading"))
        content |= report_json(checkpoint, totals, layers)
        lines = report(checkpoint, totals, layers)
    if options.verify:
        content["verifies"] = True
        # Beside hashes, lest it be taken for one.
        if options.hashes:
            print("verifies", file=sys.stderr)
        else:
            lines.append("verifies")
    if options.json:
        print(to_json(content))
    else:
        print_lines(lines)


def _open(folder: Path, verify: bool) -> tuple[Checkpoint, list[str]]:
    opened = open_folder(folder)
    for line in opened.skipped:
        print(f"skipped: {visible(line)}", file=sys.stderr)
    if verify:
        if not opened.hashed:
            opened.checkpoint.verify(opened.checkpoint.manifest.files, _transfer("hashing files"))
        check_state(opened.checkpoint, _transfer("checking numbers"))
    return opened.checkpoint, opened.skipped


def _transfer(what: str) -> Transfer:
    return Transfer(what, lambda line: print(line, file=sys.stderr))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    # Known before anything is printed: whoever reads it may leave.
    found: list[int] = []

    def work() -> None:
        try:
            run(parse(arguments), found.append)
        except CheckpointError as error:
            # What may not be read is not damaged.
            if isinstance(error.__cause__, PermissionError):
                raise
            print(f"error: {visible(str(error))}", file=sys.stderr)
            found.append(EXIT_DAMAGED)

    code = answer(work)
    return code or (found[-1] if found else 0)


if __name__ == "__main__":
    # Names of folders may hold characters that the terminal's encoding does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
