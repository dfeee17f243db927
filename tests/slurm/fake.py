"""The job script without SLURM: programs of its names that note what they are asked, in place of starting anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed import ROOT
from tests.slurm.conftest import SCRIPT

# The first $FAKE_TIMES requests that begin with the words of $FAKE_FAILING fail, as $FAKE_ERROR says.
_SCONTROL = """\
#!/bin/bash
if [[ -n ${FAKE_FAILING:-} && "$*" == "$FAKE_FAILING"* ]]; then
  echo >>"$FAKE_FOLDER/failed"
  if (($(wc -l <"$FAKE_FOLDER/failed") <= FAKE_TIMES)); then
    echo "$FAKE_ERROR" >&2
    exit 1
  fi
fi
case "$1 $2" in
  "show hostnames") printf 'n0\\nn1\\n' | head -n "$SLURM_JOB_NUM_NODES" ;;
  "show node") echo "NodeName=$4 NodeAddr=127.0.0.1 CPUs=1" ;;
  "show job") echo "JobId=$SLURM_JOB_ID $FAKE_JOB" ;;
  requeue*) touch "$FAKE_FOLDER/requeued" ;;
esac
"""

# No test waits for the pauses between two requests.
_SLEEP = """\
#!/bin/bash
echo "$1" >>"$FAKE_FOLDER/slept"
"""

# Under the name of a launcher: a run that has ended as $FAKE_END says, if that is set, and its script if $FAKE_KILLED.
# $FAKE_TOLD: SLURM tells the script to end.
_RUN = """\
#!/bin/bash
[[ -z ${FAKE_TOLD:-} ]] || kill -TERM "$PPID"
printf '%s\\0' "$@" >"$FAKE_FOLDER/run"
[[ -z ${FAKE_END:-} ]] || printf '%s' "$FAKE_END" >"$SLOPE_END_FILE"
[[ -z ${FAKE_KILLED:-} ]] || kill -KILL "$PPID"
exit "${FAKE_CODE:-0}"
"""


@dataclass
class FakeJob:
    """Job 7, of which each call of `part` is one.

    Args:
        folder: an empty folder.
        nodes: how many it has.
    """

    folder: Path
    nodes: int = 2
    restarts: int = 0
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        for name, text in (("scontrol", _SCONTROL), ("sleep", _SLEEP), ("srun", _RUN)):
            self.program(programs / name, text)

    def program(self, path: Path, text: str) -> Path:
        """A shell script that can be called."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def part(
        self,
        *arguments: str,
        end: dict[str, Any] | None = None,
        code: int = 0,
        job: str = "JobState=RUNNING",
        **more: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the script once, with a run that ends so, while SLURM says so of the job."""
        for name in ("run", "requeued", "failed", "slept"):
            (self.folder / name).unlink(missing_ok=True)
        drop = ("SLURM_", "SLOPE_", "FAKE_", "MASTER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        variables = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[0-1]",
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_RESTART_COUNT": str(self.restarts),
            "SLOPE_JOBS": str(self.folder / "jobs"),
            "SLOPE_PYTHON": sys.executable,
            "SLOPE_RANKS_PER_NODE": "1",
            "FAKE_FOLDER": str(self.folder),
            "FAKE_JOB": f"{job} Requeue=1 Restarts={self.restarts} PreemptTime=None",
            "FAKE_END": "" if end is None else json.dumps(end),
            "FAKE_CODE": str(code),
        }
        self.restarts += 1
        config = str(ROOT / "configs/tiny.json")
        return subprocess.run(
            ["bash", SCRIPT, "--config", config, *arguments],
            cwd=ROOT,
            env=kept | variables | self.variables | more,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def started(self) -> list[str]:
        """The words that the launcher was given by the last part; none if it was not called."""
        path = self.folder / "run"
        return path.read_bytes().decode().split("\0")[:-1] if path.exists() else []

    @property
    def requeued(self) -> bool:
        """Whether the last part has asked SLURM to requeue the job."""
        return (self.folder / "requeued").exists()

    @property
    def slept(self) -> list[float]:
        """The pauses of the last part, in seconds."""
        path = self.folder / "slept"
        return [float(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verdicts(self) -> list[str]:
        """What was decided after each part."""
        path = self.folder / "jobs/7.jsonl"
        return [json.loads(line)["verdict"] for line in path.read_text().splitlines() if line]
