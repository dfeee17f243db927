"""How a run stands: one screen, from its folder alone.

    python tools/status.py runs/tiny
    python tools/status.py runs/tiny --follow 5
    python tools/status.py runs/tiny --json
    python tools/status.py runs/tiny --verify

The run may be going on, on this machine or another one that shares the folder; it is not disturbed, and nothing is
written. docs/metrics.md says what each line means, how goodput is defined, and what --json holds.

exit codes:
  0  done, however the run stands
  2  the command line is wrong, or there is no such folder or it is not a run's
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console
from rich.live import Live

from slope_dist.command_line import Parser, answer, path_argument
from slope_dist.errors import UserError
from slope_dist.training.status import Observer, Status
from slope_dist.training.status_screen import as_json, screen

LONGEST_PAUSE = 86_400
PIPED_WIDTH = 200


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option is unknown or missing.
    """
    parser = Parser(__doc__)
    parser.add_argument("folder", type=path_argument, metavar="RUN", help="the run folder")
    parser.add_argument("--json", action="store_true", help="the same as JSON; with --follow one object a line")
    parser.add_argument("--follow", type=float, metavar="SECONDS", help="look again and again, with this pause")
    parser.add_argument("--verify", action="store_true", help="read all bytes of the newest checkpoint")
    options = parser.parse_args(arguments)
    if options.follow is not None and not 0 < options.follow <= LONGEST_PAUSE:
        raise UserError(f"--follow {options.follow}: the pause must be above 0 and at most {LONGEST_PAUSE} seconds")
    return options


def run(options: argparse.Namespace) -> None:
    """Look, and show what was seen."""
    observer = Observer(options.folder)
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    if options.follow is None:
        show(observer.look(verify=options.verify), console, options.json)
        return
    if options.json or not console.is_terminal:
        while True:
            status = observer.look(verify=options.verify)
            if options.json:
                print(as_json(status).replace("\n", ""), flush=True)
            else:
                show(status, console, False)
                print(flush=True)
            time.sleep(options.follow)
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(screen(observer.look(verify=options.verify)), refresh=True)
            time.sleep(options.follow)


def show(status: Status, console: Console, machine: bool) -> None:
    """Print a status."""
    if machine:
        print(as_json(status))
        return
    # Rich itself would end the program where a pipe is closed, and fills lines with spaces.
    with console.capture() as capture:
        console.print(screen(status))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return answer(lambda: run(parse(arguments)))


if __name__ == "__main__":
    # Names of folders may hold characters that the terminal's encoding does not have.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
