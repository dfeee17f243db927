"""Claim: one job at a time uses a run folder, whoever dies lets it go, and end.json says how the last one ended.

Run: pytest tests/training/test_ending.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slope_dist.errors import EXIT_BAD_INPUT, UnfinishedError, UserError
from slope_dist.training import ending
from slope_dist.training.ending import END, END_FILE, HISTORY, LOCK, Turn, read_history, write_end
from tests.distributed import Outcome, end_ranks
from tests.runs import pretrain, step_rows, watch_engines, write_config

HOLD = """
import sys, time
from pathlib import Path
from slope_dist.training.ending import Turn
turn = Turn(Path(sys.argv[1]))
turn.take()
turn.sign()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()


def test_a_second_job_is_refused_by_the_name_of_the_first(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "PATIENCE", 0.3)
    with pytest.raises(UnfinishedError, match=rf"is in use by process {holder.pid} on .*touch .*/stop") as refusal:
        Turn(tmp_path).take()
    assert "\n" not in str(refusal.value)


def test_a_killed_job_lets_go(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    start = time.monotonic()
    turn = Turn(tmp_path)
    turn.take()
    assert time.monotonic() - start < 5 and turn.warning is None
    turn.sign()
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    turn.release()
    Turn(tmp_path).take()


def test_a_job_that_is_just_leaving_is_waited_for(tmp_path: Path) -> None:
    first = Turn(tmp_path)
    first.take()
    child = os.fork()
    if child == 0:
        # Its copy of the descriptor is what keeps the lock.
        time.sleep(0.6)
        os._exit(0)
    first.release()
    Turn(tmp_path).take()
    assert os.waitpid(child, os.WNOHANG) != (0, 0) or os.waitpid(child, 0)[1] == 0


def test_a_folder_that_is_not_there_is_nobodys(tmp_path: Path) -> None:
    turn = Turn(tmp_path / "none")
    turn.take()
    assert turn.warning is None and not (tmp_path / "none").exists()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(ending.fcntl, "flock", unsupported)
    turn = Turn(tmp_path)
    turn.take()
    assert turn.warning is not None and "Operation not supported" in turn.warning


def test_the_end_is_replaced_whole_and_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_end(tmp_path, "running", step=3)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_end(tmp_path, "stopped", step=4, checkpoint="step-00000004", exit_code=75, cause="SIGTERM")
    end = json.loads((tmp_path / END).read_text())
    assert end | {"how": "stopped", "step": 4, "job": "77", "pid": os.getpid()} == end
    assert sorted(os.listdir(tmp_path)) == [END, HISTORY]
    write_end(tmp_path / "none", "failed")


def test_writers_at_once_do_not_share_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When rank 0 is lost, one rank on each machine writes; here one is killed in it while another does."""
    replace = os.replace

    def with_another(source: Path, target: Path) -> None:
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(os, "replace", lambda *_: os._exit(0))
            write_end(tmp_path, "failed", rank=1)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", with_another)
        write_end(tmp_path, "failed", rank=0)
    assert json.loads((tmp_path / END).read_text())["rank"] == 0
    [left] = set(os.listdir(tmp_path)) - {END, HISTORY}
    assert left.startswith(f".{END}.")
    write_end(tmp_path, "running", step=3)
    assert sorted(os.listdir(tmp_path)) == [END, HISTORY], "the next part has removed what the killed one left"


def test_an_end_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / END).mkdir()
    write_end(tmp_path, "failed", step=3)
    assert sorted(os.listdir(tmp_path)) == [END, HISTORY]


def test_the_history_has_every_turn_and_how_it_ended(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    write_end(tmp_path, "running", step=0)
    write_end(tmp_path, "running", step=2)
    # Rank 0 was lost, and the first ranks of two machines say so.
    write_end(tmp_path, "failed", step=5, cause="rank 0 was lost")
    write_end(tmp_path, "failed", step=4, cause="rank 0 was lost")
    write_end(tmp_path, "running", step=4)
    with (tmp_path / HISTORY).open("a") as file:
        file.write('not JSON\n[]\n{"how": "running"}\n{"how": "fini')
    parts = read_history(tmp_path)
    assert [part.start["step"] for part in parts] == [0, 2, 4]
    ends = [part.end and (part.end["how"], part.end["step"]) for part in parts]
    assert ends == [None, ("failed", 5), None]


def test_a_history_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / HISTORY).mkdir()
    with pytest.raises(UserError, match=f"{HISTORY} cannot be read: "):
        read_history(tmp_path)


def first_and_second(config: str) -> None:
    """A run, in whose third step the same command is given again."""

    def again(event: str, engine: object, step: object) -> None:
        if (event, step) == ("before step", 3):
            code = "import sys; from slope_dist.training import ending; ending.PATIENCE = 1.0\n"
            code += "from launch.pretrain import main; sys.exit(main(sys.argv[1:]))"
            ran = subprocess.run(
                [sys.executable, "-c", code, "--config", config],
                capture_output=True,
                text=True,
                env=os.environ | {END_FILE: f"{config}.second"},
            )
            print(f"second: {ran.returncode} {ran.stderr}", flush=True)

    watch_engines(again)
    raise SystemExit(pretrain("--config", config))


def test_two_jobs_in_one_folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(write_config(tmp_path, corpus, training__steps=4, checkpoint__interval=1))
    first: Outcome
    [first] = end_ranks(first_and_second, 1, config, process_group=False)
    assert first.code == 0, first.errors
    [line] = [line for line in first.output.splitlines() if line.startswith("second: ")]
    assert line.startswith(f"second: {EXIT_BAD_INPUT} error: run.folder ") and "is in use by process " in line
    told = json.loads(Path(f"{config}.second").read_text())
    assert (told["how"], told["exit_code"], told["temporary"]) == ("failed", EXIT_BAD_INPUT, True)
    assert [row["step"] for row in step_rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / END).read_text())["how"] == "finished"


def meanwhile(first: str, second: str) -> None:
    """A run whose folder is new, in which another begins and ends while this one verifies its corpora."""
    from slope_dist.training import corpora

    verify = corpora.Corpora.verify

    def slow(self: Any) -> None:
        verify(self)
        code = "import sys; from launch.pretrain import main; sys.exit(main(sys.argv[1:]))"
        subprocess.run([sys.executable, "-c", code, "--config", second], check=True, stdout=subprocess.DEVNULL)

    corpora.Corpora.verify = slow  # type: ignore[method-assign]
    raise SystemExit(pretrain("--config", first))


def test_a_job_that_had_a_new_folder_meanwhile_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    """Another run's: the second one's rows, config and checkpoints are as it left them."""
    changes = {"run__folder": str(tmp_path / "run"), "training__steps": 3, "checkpoint__interval": 1}
    first, second = (write_config(tmp_path / str(seed), corpus, run__seed=seed, **changes) for seed in (1, 2))
    [outcome] = end_ranks(meanwhile, 1, str(first), str(second), process_group=False)
    assert outcome.code == EXIT_BAD_INPUT and outcome.errors.count("error: ") == 1, outcome.errors
    assert f"another job has had run.folder {tmp_path / 'run'} meanwhile, and left step-00000003;" in outcome.errors
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["seed"] == 2
    assert [row["step"] for row in step_rows(tmp_path / "run")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / END).read_text())["how"] == "finished"


def test_a_folder_that_cannot_be_looked_at_is_one_line(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, run__folder=str(tmp_path / ("long" * 100)))
    [outcome] = end_ranks(run_of_a_job, 1, "", "--config", str(config), process_group=False)
    assert outcome.code == EXIT_BAD_INPUT and "Traceback" not in outcome.errors, outcome.errors
    assert outcome.errors.count("error: ") == 1 and "File name too long" in outcome.errors


def asked_in_its_first_step(config: str) -> None:
    def ask(event: str, engine: object, step: object) -> None:
        if (event, step) == ("before step", 1):
            print((Path(config).parent / "run" / END).read_text(), flush=True)
            os.kill(os.getpid(), signal.SIGUSR1)

    watch_engines(ask)
    raise SystemExit(pretrain("--config", config))


def test_a_damaged_checkpoint_is_told_until_the_run_has_replaced_it(corpus: Path, tmp_path: Path) -> None:
    config, run = str(write_config(tmp_path, corpus, training__steps=4, checkpoint__interval=2)), tmp_path / "run"
    names = {step: f"step-{step:08d}" for step in (2, 3, 4)}

    def ended() -> tuple[Any, Any, Any]:
        end = json.loads((run / END).read_text())
        return end["how"], end["checkpoint"], end["damaged"]

    [first] = end_ranks(run_of_a_job, 1, "", "--config", config, process_group=False)
    assert first.code == 0 and ended() == ("finished", names[4], [])
    [weights, *_] = (run / "checkpoints" / names[4]).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    [second] = end_ranks(asked_in_its_first_step, 1, config, process_group=False)
    [begun] = [json.loads(line) for line in second.output.splitlines() if line.startswith("{")]
    assert (begun["how"], begun["checkpoint"], begun["damaged"]) == ("running", names[2], [names[4]])
    assert ended() == ("stopped", names[3], [names[4]])
    [third] = end_ranks(run_of_a_job, 1, "", "--config", config, process_group=False)
    assert third.code == 0 and ended() == ("finished", names[4], [])


def run_of_a_job(own: str, *arguments: str) -> None:
    os.environ[END_FILE] = own
    raise SystemExit(pretrain(*arguments))


def test_a_job_is_told_in_a_file_of_its_own_how_its_run_ended(corpus: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, corpus, training__steps=3))
    own, run = tmp_path / "own", tmp_path / "run"

    def end(*arguments: str, ranks: int = 1) -> dict[str, Any]:
        own.unlink(missing_ok=True)
        outcomes = end_ranks(run_of_a_job, ranks, str(own), "--config", config, *arguments, process_group=False)
        content = json.loads(own.read_text())
        assert content["exit_code"] in [outcome.code for outcome in outcomes]
        return content

    # Refused before there is a run folder, and before it is known whose it is.
    wrong = end("--set", "training.steps=0")
    assert (wrong["how"], wrong["exit_code"], wrong["folder"]) == ("failed", EXIT_BAD_INPUT, None)
    assert "training.steps: must be at least 1" in wrong["cause"] and not run.exists()
    wrong = end("--set", f"data.folder={tmp_path}/none", ranks=2)
    assert (wrong["how"], wrong["exit_code"]) == ("failed", EXIT_BAD_INPUT) and "no corpus in" in wrong["cause"]
    done = end()
    assert (done["how"], done["step"], done["exit_code"], done["folder"]) == ("finished", 3, 0, str(run))
    assert {key: value for key, value in done.items() if key != "folder"} == json.loads((run / END).read_text())
    # What is in the run folder is the part's before.
    wrong = end("--set", "run.seed=8")
    assert (wrong["how"], wrong["exit_code"]) == ("failed", EXIT_BAD_INPUT) and "is of another run" in wrong["cause"]
    assert json.loads((run / END).read_text())["how"] == "finished"
    assert end()["how"] == "finished", "although nothing was left to do"


def test_a_file_that_a_job_cannot_have_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(END_FILE, str(tmp_path / "none" / "end"))
    write_end(tmp_path, "running", step=3)
    write_end(None, "failed", step=3)
    assert json.loads((tmp_path / END).read_text())["how"] == "running"
