"""Claim: under real launchers a stopped run saves and says so in end.json, whatever the launcher makes of exit codes,
and no rank outlives its launcher.

Run: pytest tests/launch/test_stopping.py -m slow
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slope_dist.errors import EXIT_STOPPED
from slope_dist.lines import port_to_meet_at
from tests.runs import newest, step_rows, write_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2000
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
    # As the SLURM job script starts it with a hostfile.
    "runner": ["python", "-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
}

pytestmark = pytest.mark.slow


class Launched:
    """A run of two ranks under a launcher, past its third step."""

    def __init__(self, launcher: str, config: Path) -> None:
        self.run = config.parent / "run"
        folder = Path(sys.executable).parent
        environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
        environment |= {"PATH": f"{folder}:{environment['PATH']}", "PYTHONPATH": str(ROOT)}
        program, *options = LAUNCHERS[launcher]
        options += ["--master_port", str(port_to_meet_at())]
        self.process = subprocess.Popen(
            [str(folder / program), *options, "launch/pretrain.py", "--config", str(config)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        end = time.monotonic() + 120
        while not (self.run / "metrics.jsonl").exists() or len(step_rows(self.run)) < 3:
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate()[0][-3000:]
            time.sleep(0.2)
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = [child for child in children if self._is_rank(child)]
        assert len(self.ranks) == 2, [child.cmdline() for child in children]

    @staticmethod
    def _is_rank(process: psutil.Process) -> bool:
        command = process.cmdline()
        at = next((place for place, word in enumerate(command) if word.endswith("launch/pretrain.py")), None)
        # The launcher's own command line names the program too, after options of its own.
        return at is not None and at <= 2

    def wait_for_ranks(self) -> None:
        """Until no rank is left."""
        _, alive = psutil.wait_procs(self.ranks, timeout=40)
        assert not alive, "a rank has outlived its launcher"

    def end(self) -> dict[str, object]:
        """How the run says it ended."""
        return json.loads((self.run / "end.json").read_text())


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, corpus, training__steps=STEPS, parallel__zero_stage=1)


@pytest.fixture
def launched(request: pytest.FixtureRequest, config: Path) -> Iterator[Launched]:
    made = Launched(request.param, config)
    yield made
    for process in made.ranks:
        if process.is_running():
            process.kill()
    made.process.kill()
    made.process.communicate()


@pytest.mark.parametrize("launched", LAUNCHERS, indirect=True)
@pytest.mark.parametrize("to", ["a rank", "the launcher", "all ranks"])
def test_a_signal_stops_the_run(to: str, launched: Launched) -> None:
    if to == "the launcher":
        launched.process.send_signal(signal.SIGTERM)
    else:
        for rank in launched.ranks[1:] if to == "a rank" else launched.ranks:
            rank.send_signal(signal.SIGTERM if to == "all ranks" else signal.SIGUSR1)
    launched.process.communicate(timeout=60)
    launched.wait_for_ranks()
    end = launched.end()
    assert (end["how"], end["exit_code"]) == ("stopped", EXIT_STOPPED), end
    assert end["checkpoint"] == newest(launched.run).path.name
    assert newest(launched.run).step == end["step"] == len(step_rows(launched.run)) < STEPS


@pytest.mark.parametrize("launched", LAUNCHERS, indirect=True)
def test_ranks_stop_when_their_launcher_is_killed(launched: Launched) -> None:
    # deepspeed's own process starts another, which starts the ranks.
    for process in [
        *psutil.Process(launched.process.pid).children(recursive=True),
        psutil.Process(launched.process.pid),
    ]:
        if process.pid not in [rank.pid for rank in launched.ranks] and "pretrain.py" in " ".join(process.cmdline()):
            process.kill()
    launched.wait_for_ranks()
    end = launched.end()
    assert (end["how"], end["cause"]) == ("stopped", "the end of its launcher"), end
    assert newest(launched.run).step == end["step"]
