"""Claim: the job script runs a config under SLURM, on any number of nodes and by each launcher; whatever ends a part of
the run (the early signal, preemption, a death, scancel, fewer nodes), the whole run is the uninterrupted one; and what
cannot heal is not repeated.

A real SLURM of two nodes, both on this machine, and real training on CPUs. Not covered: GPUs as a SLURM resource,
several machines, ssh between nodes, sacct.

Run: pytest -m slurm tests/slurm
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.runs import newest, relative
from tests.slurm.conftest import STEPS, Job, Submit

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("launcher", "nodes", "ranks"), [("srun", 1, 2), ("deepspeed", 2, 1), ("deepspeed", 1, 2), ("hostfile", 1, 2)]
)
def test_each_launcher_gives_the_same_run(
    launcher: str, nodes: int, ranks: int, submit: Submit, straight: Job, tmp_path: Path
) -> None:
    # There is no sshd here, which deepspeed would ask for, though not use, with the only node its own.
    variables = {"SLOPE_DEEPSPEED_ARGS": "--no_ssh_check"} if launcher == "hostfile" else {}
    job = submit(tmp_path, f"--nodes={nodes}", launcher=launcher, ranks=ranks, variables=variables)
    job.ended()
    assert job.losses == straight.losses and len(job.losses) == STEPS
    assert f"{nodes} nodes x {ranks} ranks by {launcher}" in job.log
    assert "2 = tensor 1 x pipeline 1 x data 2" in job.log
    assert [part["verdict"] for part in job.parts] == ["done"]


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_words_before_the_python_reach_each_rank(launcher: str, submit: Submit, straight: Job, tmp_path: Path) -> None:
    """As those that enter a container do."""
    # The script's own interpreter needs no prefix.
    variables = {"SLOPE_RANK_PYTHON": f"env SLOPE_PREFIX=1 {sys.executable}"}
    job = submit(tmp_path, "--nodes=2", launcher=launcher, variables=variables)
    job.reached(10)
    assert {rank: process.environ().get("SLOPE_PREFIX") for rank, process in job.ranks().items()} == {0: "1", 1: "1"}
    job.ended()
    assert job.losses == straight.losses


def test_the_straight_run_is_one_part_in_one_log(straight: Job) -> None:
    assert len(straight.losses) == STEPS and straight.resumed_after == []
    assert [part["verdict"] for part in straight.parts] == ["done"]
    assert "2 nodes x 1 ranks by srun, which meet at 127.0.0.1:" in straight.log


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_the_early_signal_saves_and_requeues(launcher: str, submit: Submit, straight: Job, tmp_path: Path) -> None:
    # Not even one failure is allowed, and this is none.
    job = submit(tmp_path, "--nodes=2", launcher=launcher, variables={"SLOPE_MAX_REQUEUES": "0"})
    job.reached(30)
    job.early_signal()
    part = job.decided(1)
    assert (part["verdict"], part["counted"]) == ("go on", False), part
    assert part["reason"].startswith(f"stopped by {'SIGUSR1' if launcher == 'srun' else 'its job script'} after step ")
    job.ended()
    # From the very step that it stopped after, not from the last regular checkpoint.
    assert job.resumed_after == [part["checkpoint"]] and part["checkpoint"] >= 30
    assert job.losses == straight.losses
    assert "slope: job" in job.log and job.log.count(" part 0: ") == job.log.count(" part 1: ") == 1, (
        "one log for all parts"
    )


def test_a_job_that_is_preempted_goes_on_when_there_is_room(submit: Submit, straight: Job, tmp_path: Path) -> None:
    job = submit(tmp_path, "--nodes=2", variables={"SLOPE_MAX_REQUEUES": "0"})
    job.reached(30)
    urgent = job.slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    part = job.decided(1)
    assert (part["verdict"], part["counted"]) == ("go on", False) and "preempted" in part["reason"], part
    assert part["checkpoint"] >= 30
    job.slurm.wait("the urgent job has run", lambda: job.slurm.state(urgent) == "COMPLETED")
    job.ended()
    assert job.resumed_after == [part["checkpoint"]]
    assert job.losses == straight.losses


@pytest.mark.parametrize("node", ["n1", "n0"])
def test_a_node_that_fails_is_left_to_slurm_to_requeue(
    node: str, submit: Submit, straight: Job, tmp_path: Path
) -> None:
    """With the script on the other node, which hears of it, and on the node itself."""
    job = submit(tmp_path, "--nodes=2", variables={"SLOPE_MAX_REQUEUES": "0"}, arguments=("--resume", "never"))
    job.reached(30)
    # Its daemon lives, so that it is back at once.
    job.slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    part = job.decided(1)
    assert (part["verdict"], part["counted"]) == ("go on", False), part
    assert part["reason"].startswith("SLURM took the job back, as when a node fails") and part["checkpoint"] >= 20
    job.ended()
    assert "slope: job" in job.log and "requeued" not in job.log, "not by the script"
    assert [part["verdict"] for part in job.parts] == ["go on", "done"] and len(job.resumed_after) == 1
    assert job.losses == straight.losses


def test_a_node_that_fails_ends_a_job_that_is_not_to_be_requeued(submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path, "--nodes=2", "--no-requeue")
    job.reached(30)
    job.slurm.run("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    job.ended("NODE_FAIL")
    assert [part["verdict"] for part in job.parts] == ["done"]
    assert "a node failed, and SLURM does not requeue this job" in job.log and "submit it again to go on" in job.log


@pytest.mark.parametrize(("launcher", "rank"), [("srun", 1), ("srun", 0), ("deepspeed", 1)])
def test_a_killed_rank_ends_the_part_and_the_run_goes_on(
    launcher: str, rank: int, submit: Submit, straight: Job, tmp_path: Path
) -> None:
    job = submit(tmp_path, "--nodes=2", launcher=launcher)
    job.reached(50)
    job.ranks()[rank].send_signal(signal.SIGKILL)
    part = job.decided(1)
    assert (part["verdict"], part["counted"]) == ("go on", True), part
    assert "failure 1 of at most 5" in part["reason"] and part["checkpoint"] >= 20
    job.ended()
    assert job.resumed_after == [part["checkpoint"]]
    assert job.losses == straight.losses


@pytest.mark.parametrize("killed", [False, True], ids=["scancel", "killed and scancel"])
def test_scancel_while_a_checkpoint_is_written_loses_nothing(
    killed: bool, submit: Submit, straight: Job, tmp_path: Path
) -> None:
    # With one after each step there is nearly always one being written.
    job = submit(tmp_path, "--nodes=2", checkpoint__interval=1)
    job.reached(20)
    if killed:
        ranks, unfinished = job.ranks().values(), job.run.joinpath("checkpoints")
        while not any(".tmp-" in path.name for path in unfinished.glob("step-*")):
            assert job.last_step() < STEPS
        for process in ranks:
            process.send_signal(signal.SIGKILL)
    job.slurm.run("scancel", job.number)
    job.ended("CANCELLED")
    said = [int(line.split()[2].rstrip(":")) for line in job.log.splitlines() if line.startswith("saved step ")]
    assert newest(job.run).step >= max(said)
    assert "slope: job" in job.log and ("requeued" not in job.log or killed), "a cancelled job is not requeued"
    again = submit(tmp_path, "--nodes=2")
    again.ended()
    assert again.number != job.number and again.resumed_after[0] >= max(said)
    assert again.losses == straight.losses


def test_the_number_of_nodes_changes_between_parts(submit: Submit, straight: Job, tmp_path: Path) -> None:
    layout = {"tensor": 2, "data": 1, "zero_stage": 1, "zero3_persistence_threshold": 0}
    layout["alternatives"] = [
        {"tensor": 1, "data": 2},
        {"tensor": 1, "data": 1, "zero_stage": 3, "micro_batch_size": 4},
    ]
    job = submit(tmp_path, "--nodes=1-2", parallel=layout)
    job.reached(40)
    slurm = job.slurm
    # A node fails the night's checks, and is well again later.
    slurm.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    try:
        job.early_signal()
        first = job.decided(1)
        job.reached(first["checkpoint"] + 30)
        assert (
            "layout: parallel.alternatives[1], tensor 1 x pipeline 1 x data 1, deepspeed ZeRO 3, micro-batch 4"
            in job.log
        )
        assert '"alternatives": []' in (job.run / "config.json").read_text()
    finally:
        slurm.run("scontrol", "update", "nodename=n1", "state=resume")
    slurm.wait("the node is back", lambda: slurm.nodes()["n1"] == "idle")
    job.early_signal()
    second = job.decided(2)
    job.ended()
    assert job.resumed_after == [first["checkpoint"], second["checkpoint"]]
    assert [line.split(" = ")[1].split(";")[0] for line in job.log.splitlines() if line.startswith("ranks: ")] == [
        "tensor 2 x pipeline 1 x data 1",
        "tensor 1 x pipeline 1 x data 1",
        "tensor 2 x pipeline 1 x data 1",
    ]
    assert job.losses.keys() == straight.losses.keys()
    assert max(relative(loss, straight.losses[step]) for step, loss in job.losses.items()) < 1e-5


def test_nodes_that_fit_no_layout_stay_idle(submit: Submit, tmp_path: Path) -> None:
    layout = {"tensor": 2, "data": 2, "alternatives": [{"tensor": 1, "data": 1}]}
    job = submit(tmp_path, "--nodes=2", parallel=layout, training__steps=4)
    job.ended()
    assert "no layout of the run fits 2 nodes x 1 ranks; it uses 1 of them, the others stay idle" in job.log
    assert "layout: parallel.alternatives[0], tensor 1 x pipeline 1 x data 1" in job.log and len(job.losses) == 4


def test_a_config_that_cannot_be_is_refused_before_anything_is_started(submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path, "--nodes=2", arguments=("--set", "training.steps=0"))
    job.ended("FAILED")
    assert "training.steps: must be at least 1, not 0 (from --set)" in job.log
    assert "nodes x" not in job.log and "requeued" not in job.log


def test_a_run_that_is_refused_is_not_requeued(submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path, "--nodes=1", data={"folder": str(tmp_path / "nowhere")})
    job.ended("FAILED")
    [part] = job.parts
    assert part["verdict"] == "give up" and "refused, and would be again: no corpus in " in part["reason"]
    assert "requeued" not in job.log


def test_an_error_that_repeats_without_progress_ends_the_job(submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path, "--nodes=1", training__learning_rate=1e25, training__gradient_clipping=0.0)
    job.ended("FAILED")
    assert [part["verdict"] for part in job.parts] == ["go on", "give up"]
    assert "2 failures in a row have left no new checkpoint" in job.parts[1]["reason"]
    assert job.log.count("requeued") == 1


def test_a_job_fails_at_most_as_often_as_it_may_and_the_hostfile_names_the_nodes(
    submit: Submit, tmp_path: Path
) -> None:
    # Neither ssh nor pdsh reaches n0 and n1, so that the launcher fails.
    job = submit(tmp_path, "--nodes=2", launcher="hostfile", ranks=2, variables={"SLOPE_MAX_REQUEUES": "0"})
    job.ended("FAILED")
    assert (tmp_path / f"jobs/{job.number}.hosts").read_text() == "n0 slots=2\nn1 slots=2\n"
    [part] = job.parts
    assert part["verdict"] == "give up" and "it has failed 1 times, and may 0 times" in part["reason"]


def test_an_array_is_a_chain_of_parts(submit: Submit, straight: Job, tmp_path: Path) -> None:
    job = submit(tmp_path, "--nodes=2", "--array=1-3%1")
    job.reached(30)
    # An element's own number, by which its script can be reached.
    element = job.slurm.run("squeue", "-h", "--jobs", f"{job.number}_1", "-o", "%A").strip()
    # For an element of an array SLURM 22.05 delivers the signal, and ends with 1 and without a word.
    job.slurm.run("scancel", "--batch", "--signal=USR1", element, check=False)
    part = job.decided(1)
    assert part["reason"].startswith("stopped by SIGUSR1 after step ")
    job.ended()
    assert len(job.state.split()) == 3
    # The second went on and finished; the third found nothing to do, and did not start the ranks.
    assert [part["verdict"] for part in job.parts] == ["go on", "done"]
    assert job.resumed_after == [part["checkpoint"]]
    assert "element 2: 2 nodes" in job.log and "element 3: 2 nodes" not in job.log
    assert job.log.count(f"done: the run in {job.run} is finished after step {STEPS}") == 1
    assert job.losses == straight.losses


def test_an_array_whose_run_cannot_heal_ends(submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path, "--nodes=1", "--array=1-3%1", data={"folder": str(tmp_path / "nowhere")})
    job.wait("the job has ended", lambda: not job.slurm.run("squeue", "-h", "--jobs", job.number).strip())
    assert [part["verdict"] for part in job.parts] == ["give up"]
    assert sorted(set(job.state.split())) == ["CANCELLED", "FAILED"]
    assert "the array's other elements are cancelled" in job.log
