"""Claim: the job script is sound shell, names all its variables at its head, and says what it wants where it is no job;
ranks are started by the words of SLOPE_PYTHON or SLOPE_RANK_PYTHON; `--resume never` holds until a chain has
checkpoints of its own; what SLURM requeues by itself is left to it; a part whose script was killed is told to the next.

With programs in place of SLURM's that only note what they are asked; test_slurm.py has the real ones.

Run: pytest tests/slurm/test_script.py
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT
from tests.slurm.conftest import SCRIPT
from tests.slurm.fake import FakeJob

TEXT = (ROOT / SCRIPT).read_text()


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_its_head_lists_each_variable() -> None:
    head, body = TEXT.split("\n#SBATCH", 1)
    read = set(re.findall(r"\$\{((?:SLOPE|MASTER)_[A-Z_]+):-", body))
    assert read == set(re.findall(r"^#   ((?:SLOPE|MASTER)_[A-Z_]+) ", head, re.MULTILINE))


def test_outside_a_job_it_says_how_it_is_used() -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", SCRIPT], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: this is a job script; submit it: sbatch ") and done.stderr.count("\n") == 1


SAVED = {"how": "stopped", "cause": "SIGUSR1", "exit_code": 75, "step": 20, "checkpoint": "step-00000020"}
UNSAVED = {"how": "failed", "cause": "rank 1 was lost", "exit_code": 1, "step": 0, "checkpoint": None}


def test_ranks_are_started_by_the_words_of_slope_python(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    done = job.part(code=1, SLOPE_PYTHON=f"env SLOPE_PREFIX=1 {sys.executable}")
    assert "failure 1 of at most 5" in done.stdout and job.requeued, done.stderr
    at = job.started.index("env")
    assert job.started[at:][:4] == ["env", "SLOPE_PREFIX=1", sys.executable, "launch/pretrain.py"]


def test_a_path_with_spaces_is_one_word(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    python = job.program(tmp_path / "my env/bin/python", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    done = job.part(code=1, SLOPE_PYTHON=str(python))
    assert "failure 1 of at most 5" in done.stdout, done.stderr
    assert job.started[-4:-2] == [str(python), "launch/pretrain.py"]


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_what_srun_starts_may_have_a_python_of_its_own(launcher: str, tmp_path: Path) -> None:
    """As in a container that srun enters (Pyxis), where the script's own Python is not."""
    job = FakeJob(tmp_path)
    variables = {
        "SLOPE_RANK_PYTHON": "/opt/venv/bin/python",
        "SLOPE_SRUN_ARGS": "--container-image=x --container-mounts=y",
    }
    done = job.part(code=1, SLOPE_LAUNCHER=launcher, **variables)
    assert "failure 1 of at most 5" in done.stdout, done.stderr
    assert "--container-image=x" in job.started and "--container-mounts=y" in job.started
    assert "/opt/venv/bin/python" in job.started and sys.executable not in job.started


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLOPE_RANK_PYTHON": "/opt/venv/bin/python"}, "it has no SLOPE_RANK_PYTHON"),
        ({"SLOPE_PYTHON": f"env SLOPE_PREFIX=1 {sys.executable}"}, "with the last word of SLOPE_PYTHON alone"),
    ],
)
def test_the_hostfile_launcher_refuses_what_ssh_would_not_start(
    variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = FakeJob(tmp_path).part(SLOPE_LAUNCHER="hostfile", **variables)
    assert done.returncode == 2 and done.stderr.startswith("error: hostfile ") and said in done.stderr


def test_a_python_of_no_words_is_refused(tmp_path: Path) -> None:
    done = FakeJob(tmp_path).part(SLOPE_PYTHON="  ")
    assert done.returncode == 2 and done.stderr == "error: there is no python; set SLOPE_PYTHON\n"


def test_variables_that_hostfile_passes_on(tmp_path: Path) -> None:
    """The launcher, whose words are those of deepspeed, is noted in place of started."""
    job = FakeJob(tmp_path, nodes=1)
    noted = f'[[ $* != *deepspeed.launcher.runner* ]] || exec "{tmp_path}/bin/srun" "$@"'
    python = job.program(tmp_path / "python", f'#!/bin/bash\n{noted}\nexec "{sys.executable}" "$@"\n')
    passed = {
        "FI_PROVIDER": "efa",
        "UCX_TLS": "rc,sm",
        "HF_HOME": "/scratch/hf",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/a=b",
        "TRITON_CACHE_DIR": "/tmp/t",
        "OMP_PLACES": "{0:4},{4:4}",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_IB_HCA": "=mlx5_0",
    }
    kept = {
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "secret",
        "FILES": "x",
        "OMP_TWO_LINES": "1\nHF_HOME=2",
        "OTHER": "1",
    }
    done = job.part(code=1, SLOPE_LAUNCHER="hostfile", SLOPE_PYTHON=str(python), **passed, **kept)
    assert "failure 1 of at most 5" in done.stdout and "launch/pretrain.py" in job.started, done.stderr
    lines = (tmp_path / "jobs/7.environment").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines)
    assert passed.items() <= found.items() and not kept.keys() & found.keys()
    assert found["SLOPE_LAUNCHER"] == "hostfile" and found["SLURM_JOB_ID"] == "7" and "PATH" in found


@pytest.mark.parametrize("words", [["--resume", "never"], ["--resume=never"]])
def test_resume_never_is_about_the_first_part_of_a_chain(words: list[str], tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    job.part(*words, "--accept-steps", end=SAVED, code=75)
    assert job.requeued and job.started[-len(words) - 1 :] == [*words, "--accept-steps"]
    done = job.part(*words, "--accept-steps", end=SAVED, code=75)
    assert job.started[-3:] == ["--config", str(ROOT / "configs/tiny.json"), "--accept-steps"]
    assert f"{words[0]} is left out: an earlier part of this job has left checkpoints" in done.stdout
    # Any other value is left as it is.
    job.part("--resume", "auto", end=SAVED, code=75)
    assert job.started[-2:] == ["--resume", "auto"]


def test_resume_never_stays_while_the_chain_has_no_checkpoint_of_its_own(tmp_path: Path) -> None:
    """What is in the folder then is somebody else's, and not to be gone on from."""
    job = FakeJob(tmp_path)
    for _ in range(2):
        job.part("--resume", "never", end=UNSAVED, code=1)
        assert job.started[-2:] == ["--resume", "never"]


@pytest.mark.parametrize(
    ("job_state", "verdict", "said"),
    [
        # What SLURM 22.05 shows while the script is still there; Restarts is one more than this part's number.
        ("JobState=COMPLETING Reason=None Restarts=1", "go on", "starts it again by itself"),
        ("JobState=PENDING Reason=BeginTime Restarts=1", "go on", "starts it again by itself"),
        ("JobState=COMPLETING Reason=job_requeued_in_held_state Restarts=1", "go on", "until `scontrol release`"),
        ("JobState=COMPLETING Reason=NodeDown Restarts=0", "done", "SLURM does not requeue this job"),
        ("JobState=NODE_FAIL Reason=None Restarts=0", "done", "SLURM does not requeue this job"),
        ("JobState=COMPLETING Reason=None Restarts=0", "done", "cancelled or is out of time"),
    ],
)
def test_a_job_that_slurm_takes_back_is_left_to_it(job_state: str, verdict: str, said: str, tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    done = job.part(end=UNSAVED | {"how": "running"}, code=143, job=job_state)
    assert said in done.stdout and done.returncode == 0 and not job.requeued, done.stderr
    assert job.verdicts == [verdict]


@pytest.mark.parametrize("restarts", [0, 3])
def test_a_job_that_runs_is_requeued_by_the_script(restarts: int, tmp_path: Path) -> None:
    job = FakeJob(tmp_path, restarts=restarts)
    job.part(end=SAVED, code=75)
    assert job.requeued and job.verdicts == ["go on"] and not list(tmp_path.glob("jobs/*.end.json"))


RUNNING = SAVED | {"how": "running"}


def test_a_part_whose_script_was_killed_is_told_to_the_next(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    assert job.part(end=RUNNING, FAKE_KILLED="1").returncode == -signal.SIGKILL
    job.part("--resume", "never", end=UNSAVED, code=1)
    assert job.verdicts == ["go on"] * 2 and "never" not in job.started
    job.part(end=UNSAVED, code=1)
    assert len(job.verdicts) == 3, "it is told once"


def test_an_element_whose_script_was_killed_is_told_to_the_next(tmp_path: Path) -> None:
    """Whose job has another number, and has not been restarted."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9"}
    job = FakeJob(tmp_path, variables=array)

    def element(number: int, restarts: int = 0, **more: Any) -> None:
        job.restarts = restarts
        variables = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": str(7 + number)}
        job.part("--resume", "never", **variables, **more)

    element(1, end=RUNNING, FAKE_KILLED="1")
    element(2, end=RUNNING, FAKE_KILLED="1")
    assert job.verdicts == ["go on"] and "never" not in job.started
    # SLURM has restarted the second before the third begins.
    element(2, restarts=1, end=RUNNING, FAKE_KILLED="1")
    element(3, end=UNSAVED, code=1)
    assert job.verdicts == ["go on"] * 4 and not list(tmp_path.glob("jobs/*.end.json"))


def test_what_was_left_before_slurm_began_its_numbers_anew_is_nobodys(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    job.part(end=RUNNING, FAKE_KILLED="1")
    job.restarts = 0
    job.part("--resume", "never", end=UNSAVED, code=1)
    assert job.verdicts == ["go on"] and "never" in job.started


BUSY = {"FAKE_ERROR": "slurm_load_jobs error: Socket timed out on send/recv operation"}


@pytest.mark.parametrize("asked", ["show node", "show job", "requeue"])
def test_a_slurmctld_that_is_busy_for_a_while_is_asked_again(asked: str, tmp_path: Path) -> None:
    """After the SIGTERM of a preemption, which only the state of the job tells from somebody's."""
    job = FakeJob(tmp_path)
    preempted = "JobState=RUNNING PreemptTime=2026-01-02T03:04:05"
    done = job.part(
        end=SAVED | {"cause": "SIGTERM"}, code=75, job=preempted, FAKE_FAILING=asked, FAKE_TIMES="2", **BUSY
    )
    assert "which meet at 127.0.0.1:" in done.stdout and "the job is being preempted" in done.stdout, done.stderr
    assert job.requeued and job.verdicts == ["go on"] and done.returncode == 0
    assert len(job.slept) == 2 and job.slept[0] < job.slept[1]


def test_a_slurmctld_that_does_not_answer_leaves_the_name_of_the_node(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    done = job.part(end=SAVED, code=75, FAKE_FAILING="show node", FAKE_TIMES="99", **BUSY)
    assert "which meet at n0:" in done.stdout and job.requeued, done.stderr


def test_a_slurmctld_that_never_requeues_fails_the_job(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    done = job.part(end=SAVED, code=75, FAKE_FAILING="requeue", FAKE_TIMES="99", **BUSY)
    assert "SLURM does not answer; submit this job again to go on" in done.stdout and done.returncode == 1
    assert BUSY["FAKE_ERROR"] in done.stderr


def test_a_job_told_to_end_whose_state_is_not_said_is_not_one_that_somebody_stopped(tmp_path: Path) -> None:
    """Which would cancel the other elements of an array. There is less time to ask then: KillWait."""
    job = FakeJob(tmp_path)
    stopped = SAVED | {"cause": "SIGTERM"}
    job.part(end=stopped, code=75, FAKE_TOLD="1", FAKE_FAILING="show job", FAKE_TIMES="99", **BUSY)
    assert job.verdicts == ["done"] and not job.requeued
    assert sum(job.slept) <= 15


def test_a_requeue_that_was_done_though_its_answer_was_lost_is_one(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    # Seen once the requests have failed: by then the state is that of a job that was taken back.
    taken = f"""case $1 in
      requeue) touch {tmp_path}/taken; echo "{BUSY["FAKE_ERROR"]}" >&2; exit 1 ;;
      show) [[ $2 != job || ! -e {tmp_path}/taken ]] || exec echo "JobId=7 JobState=COMPLETING Restarts=1" ;;
    esac"""
    scontrol = job.folder / "bin/scontrol"
    job.program(scontrol, scontrol.read_text().replace("#!/bin/bash", f"#!/bin/bash\n{taken}"))
    done = job.part(end=SAVED, code=75)
    assert done.stdout.endswith(": requeued\n") and done.returncode == 0, done.stdout


def test_a_cluster_that_does_not_requeue_is_asked_once(tmp_path: Path) -> None:
    job = FakeJob(tmp_path)
    off = {"FAKE_ERROR": "Requested operation is presently disabled for job 7"}
    done = job.part(end=SAVED, code=75, FAKE_FAILING="requeue", FAKE_TIMES="99", **off)
    assert "SLURM does not requeue this job; submit it again to go on" in done.stdout and done.returncode == 0
    assert job.slept == []


@pytest.mark.parametrize(
    ("job_state", "verdict"),
    [("JobState=RUNNING PreemptTime=2026-01-02T03:04:05", "go on"), ("JobState=COMPLETING Reason=None", "done")],
)
def test_the_hostfile_launcher_outlives_the_end_that_its_job_is_told(
    job_state: str, verdict: str, tmp_path: Path
) -> None:
    """Of a signal, the script's or SLURM's, it would die before the ranks have saved; these hear of it by a file."""
    job = FakeJob(tmp_path, nodes=1)
    runner = f"""[[ $* == *deepspeed.launcher.runner* ]] || exec "{sys.executable}" "$@"
    kill -TERM "$PPID" "$$"
    for ((look = 0; look < 100; look++)); do
      [[ ! -e $SLOPE_STOP_FILE ]] || exec "{tmp_path}/bin/srun" "$@"
      command -p sleep 0.1
    done"""
    python = job.program(tmp_path / "python", f"#!/bin/bash\n{runner}\n")
    stopped = SAVED | {"cause": "its job script"}
    done = job.part(end=stopped, code=75, job=job_state, SLOPE_LAUNCHER="hostfile", SLOPE_PYTHON=str(python))
    assert "told to end" in done.stdout and "launch/pretrain.py" in job.started, done.stderr
    assert job.verdicts == [verdict] and job.requeued == (verdict == "go on") and done.returncode == 0
    assert "the newest checkpoint is of step 20" in done.stdout and not list(tmp_path.glob("jobs/*.stop"))
