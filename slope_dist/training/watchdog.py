"""The program of the process beside the ranks of a machine: `python -S -m slope_dist.training.watchdog < settings`.

Started by the first rank of the machine (see watch.py); imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from slope_dist.errors import EXIT_HUNG
from slope_dist.files import read_bounded
from slope_dist.training.ending import END, write_end
from slope_dist.watching.report import Report
from slope_dist.watching.watchdog import Settings, Watchdog

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks ranks to stop goes to all processes of a job."""

_LATEST = Path("checkpoints", "latest")

_MAX_END_BYTES = 2**20


def main() -> int:
    """Watch until the ranks have ended; returns the exit code."""
    # This process ends when its ranks do. Until here whoever started it has kept these from it.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline()
    if not line:
        # Whoever started it was asked to stop just then.
        return 0
    told = json.loads(line)
    folder, command = Path(told.pop("folder")), told.pop("command")
    told["addresses"] = {int(rank): address for rank, address in told["addresses"].items()}
    settings = Settings(**told)

    def conclude(report: Report, owned: bool) -> None:
        checkpoint = _newest(folder)
        lines = []
        if owned:
            try:
                lines.append(f"the Python stacks of all ranks are in {report.write(folder)}")
            except OSError as error:
                lines.append(f"warning: {folder}: the stacks cannot be written ({error.strerror})")
                lines += [evidence.stacks for evidence in report.found]
        else:
            lines += [f"rank {evidence.seen.rank}:\n{evidence.stacks}" for evidence in report.found]
        # Until it is owned the folder may be another run's.
        details = _details(report, checkpoint, settings.world_size) | {"damaged": _damaged(folder) if owned else []}
        write_end(folder if owned else None, "failed", **details)
        where = "there is no checkpoint yet; start again"
        if checkpoint is not None:
            where = f"the newest checkpoint is {folder / 'checkpoints' / checkpoint}; go on"
        print("\n".join([*lines, f"{where} with: {command}"]), file=sys.stderr, flush=True)

    Watchdog(settings, conclude).run()
    return 0


def _details(report: Report, checkpoint: str | None, ranks: int) -> dict[str, Any]:
    return {
        "step": report.step,
        "checkpoint": checkpoint,
        "exit_code": EXIT_HUNG,
        "cause": report.cause(),
        "ranks": ranks,
        "late": list(report.late.ranks),
    }


def _newest(folder: Path) -> str | None:
    """The checkpoint that was committed last, for a message; whoever goes on from one verifies it."""
    try:
        name = (folder / _LATEST).read_text()[:100].strip()
        return name if (folder / _LATEST.parent / name / "manifest.json").exists() else None
    except OSError:
        return None


def _damaged(folder: Path) -> list[str]:
    """The checkpoints of which the run has said at its start that it passed them over."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        said = json.loads(read_bounded(folder / END, _MAX_END_BYTES))
        if isinstance(said, dict) and isinstance(said.get("damaged"), list):
            return said["damaged"]
    return []


if __name__ == "__main__":
    sys.exit(main())
