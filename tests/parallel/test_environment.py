"""Claim: the rank, and where ranks meet, are read from whatever launched the process; contradictions get one line.

tests/launch runs deepspeed and torchrun themselves; srun is here in the variables that SLURM gives its tasks.

Run: pytest tests/parallel/test_environment.py
"""

from __future__ import annotations

import os
import re
import resource
import socket
import time
from pathlib import Path
from typing import Literal

import pytest

from slope_dist.errors import UserError, may_pass
from slope_dist.parallel.environment import (
    Environment,
    allow_files,
    discover,
    meeting_point,
    ranks_on_these_cores,
    start,
    why_so_few,
)
from tests.distributed import end_ranks
from tests.runs import pretrain, write_config

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_STEP_ID": "0",
}
ALONE = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_launchers_that_set_rank(variables: dict[str, str]) -> None:
    found = discover(variables)
    assert found == Environment(5, 8, 1, 4, "deepspeed or torchrun")
    assert not found.is_first
    assert discover(variables | {"RANK": "0"}).is_first


def test_srun() -> None:
    assert discover(SRUN) == Environment(5, 8, 1, 4, "srun")


# What a task of `srun` has: two nodes of an allocation of four, four tasks on the first and three on the second.
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_TASKS_PER_NODE": "4,3",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_JOB_NODELIST": "gpu[001-004]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in STEP.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "local"),
    [
        (STEP, 3),
        (STEP | {"SLURM_NODEID": "0"}, 4),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, 2),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 2),
        (without("SLURM_STEP_TASKS_PER_NODE"), 3),
        (without("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "6"}, 6),
        (without("SLURM_STEP_TASKS_PER_NODE") | {"SLURM_TASKS_PER_NODE": "4(x2)"}, 4),
        # Nothing says it: at least those that this one proves.
        (without("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"), 2),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "many", "SLURM_TASKS_PER_NODE": "5"}, 5),
    ],
)
def test_srun_says_the_tasks_of_a_node_in_several_ways(variables: dict[str, str], local: int) -> None:
    assert discover(variables) == Environment(5, 7, 1, local, "srun")


def test_a_step_of_one_task_in_a_larger_job_is_one_process() -> None:
    one = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert discover(STEP | one) == ALONE
    # The steps of a batch script and of an interactive shell, which have the job's number of tasks.
    for step in ("4294967291", "4294967290"):
        assert discover(without("SLURM_STEP_NUM_TASKS") | {"SLURM_STEP_ID": step, "SLURM_PROCID": "0"}) == ALONE


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-004]", "gpu003"),
        ("gpu[3,7-9],login1", "gpu3"),
        ("node-a.cluster,node-b.cluster", "node-a.cluster"),
        ("rack[1-2]node[0-7]-ib", "rack1node0-ib"),
        ("solo", "solo"),
    ],
)
def test_under_srun_ranks_meet_on_the_first_node_of_the_step(nodes: str, first: str) -> None:
    assert meeting_point(STEP | {"SLURM_STEP_NODELIST": nodes}) == {"MASTER_ADDR": first, "MASTER_PORT": "23458"}


def test_where_ranks_meet_is_not_guessed() -> None:
    set_by_user = {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    assert meeting_point(STEP | set_by_user) == set_by_user
    # Rank 0 may then be on any node.
    assert "MASTER_ADDR" not in meeting_point(STEP | {"SLURM_DISTRIBUTION": "arbitrary"})
    assert "MASTER_ADDR" not in meeting_point(STEP | {"SLURM_STEP_NODELIST": "gpu[003"})
    assert meeting_point(SRUN) == {}


def test_cores_are_divided_among_the_ranks_that_share_them() -> None:
    cores = len(os.sched_getaffinity(0))
    assert ranks_on_these_cores(discover(TORCHRUN), {"SLURM_CPUS_PER_TASK": str(cores)}) == 4
    assert ranks_on_these_cores(discover(SRUN), {}) == 4
    # Bound to its own cores, and not bound: it may use more than it asked for.
    assert ranks_on_these_cores(discover(SRUN), {"SLURM_CPUS_PER_TASK": str(cores)}) == 1
    assert ranks_on_these_cores(discover(SRUN), {"SLURM_CPUS_PER_TASK": str(cores - 1)}) == 4


ONE_NODE = "the usual cause: the launcher saw one node"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (DEEPSPEED | {"CROSS_SIZE": "1"}, f"{ONE_NODE}; give deepspeed a --hostfile, or start with srun"),
        (DEEPSPEED | {"CROSS_SIZE": "2"}, ""),
        # `srun deepspeed`, on all the nodes that there are.
        (DEEPSPEED | {"CROSS_SIZE": "1", "SLURM_JOB_NUM_NODES": "1"}, ""),
        (DEEPSPEED | {"CROSS_SIZE": "1", "SLURM_JOB_NUM_NODES": "4"}, f"{ONE_NODE} of the 4 in the SLURM allocation;"),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "2"}, ""),
        (TORCHRUN | {"SLURM_JOB_NUM_NODES": "3"}, "the launcher saw 2 nodes of the 3 in the SLURM allocation;"),
        (STEP, "the launcher saw 2 nodes of the 4 in the SLURM allocation;"),
        (STEP | {"SLURM_JOB_NUM_NODES": "2"}, ""),
        ({"SLURM_JOB_NUM_NODES": "2"}, f"{ONE_NODE} of the 2 in the SLURM allocation;"),
        ({"SLURM_JOB_NUM_NODES": "1"}, ""),
        ({}, ""),
    ],
)
def test_why_there_are_fewer_ranks_than_wanted(variables: dict[str, str], said: str) -> None:
    cause = why_so_few(discover(variables), variables)
    assert said in cause and bool(said) == bool(cause)


def test_torchrun_inside_a_slurm_job_is_torchrun() -> None:
    assert discover(SRUN | TORCHRUN | {"RANK": "2"}) == Environment(2, 8, 1, 4, "deepspeed or torchrun")


def test_no_launcher_is_one_process() -> None:
    assert discover({}) == ALONE
    # A shell inside an allocation, which srun did not start; and srun of a single task.
    assert discover({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}) == ALONE
    assert discover(SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == ALONE


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"RANK": "-1"}, "rank -1 of 8"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE=eight"),
        ({"RANK": "0"}, r"WORLD_SIZE=\(unset\)"),
        (SRUN | {"SLURM_PROCID": "8"}, "rank 8 of 8"),
        (SRUN | {"SLURM_LOCALID": ""}, "SLURM_LOCALID="),
        (SRUN | {"SLURM_NTASKS": "eight"}, "SLURM_NTASKS=eight"),
    ],
)
def test_contradictions(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        discover(variables)
    assert "\n" not in str(caught.value)


def start_on(port: int) -> str:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        start(Environment(0, 2, 0, 2, "deepspeed or torchrun"), threads=1)
    except UserError as error:
        return f"{error}: {may_pass(error)}"
    return "not refused"


def test_a_port_in_use_is_told_in_a_line() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        [outcome] = end_ranks(start_on, 1, port, process_group=False)
    assert outcome.result == (
        f"port {port}, where ranks are to meet, is in use on this machine (by another run?); give the launcher another "
        "--master_port, or set MASTER_PORT under srun: True"
    ), outcome.errors


BLIND = (
    r"error: \S+ has NVIDIA GPUs \(.*driver\), and torch \S+ sees none of them: .* CUDA_VISIBLE_DEVICES= trains on .*"
)


def start_blind(config: str, driver: str, cuda: str | None, hidden: str | None) -> None:
    """A run with a torch that sees no GPU."""
    import torch
    from deepspeed.accelerator import real_accelerator

    from slope_dist.parallel import environment

    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if hidden is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    torch.version.cuda = cuda
    torch.cuda.is_available = lambda: False
    environment.DRIVER = Path(driver)
    # The process that this one is forked from may have seen a GPU, and chosen it for DeepSpeed.
    real_accelerator.ds_accelerator = None
    os.environ["DS_ACCELERATOR"] = "cpu"
    raise SystemExit(pretrain("--config", config))


@pytest.mark.parametrize(
    ("backend", "limits", "left"),
    [
        ("nccl", (300, 8192), 8192),
        ("nccl", (300, 4000), "1000 ranks need up to 4256 open files a process, and 4000 are allowed; raise"),
        ("gloo", (300, 8192), "1000 ranks need up to 10256 open files a process, and 8192 are allowed; raise"),
        # Beyond what this machine may allow, so the system's limit is not asked.
        ("nccl", (300, 10**9), 65536),
        ("nccl", (300, resource.RLIM_INFINITY), 65536),
        ("gloo", (90000, 10**9), 90000),
        ("gloo", (resource.RLIM_INFINITY, resource.RLIM_INFINITY), resource.RLIM_INFINITY),
    ],
)
def test_a_process_may_open_as_many_files_as_its_ranks_take(
    backend: Literal["nccl", "gloo"], limits: tuple[int, int], left: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: set_to.append(new))
    if isinstance(left, str):
        with pytest.raises(UserError, match=f"{left} .*--propagate=NONE"):
            allow_files(1000, backend)
    else:
        allow_files(1000, backend)
        assert set_to[-1] == (left, limits[1])


def start_with_files(config: str, soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    raise SystemExit(pretrain("--config", config))


def test_ranks_train_whatever_the_soft_limit_and_refuse_a_hard_one_in_a_line(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, training__steps=1, parallel__tensor=2)
    refused = end_ranks(start_with_files, 2, str(config), 64, 270, process_group=False)
    assert [rank.code for rank in refused] == [2, 2]
    [line] = "".join(rank.errors for rank in refused).splitlines()
    assert "2 ranks need up to 276 open files a process, and 270 are allowed; raise the hard limit" in line
    assert not (tmp_path / "run").exists()
    done = end_ranks(start_with_files, 2, str(config), 64, 4096, process_group=False)
    assert [rank.code for rank in done] == [0, 0], done


def test_gpus_that_torch_does_not_see_are_not_replaced_by_the_cpu(corpus: Path, tmp_path: Path) -> None:
    """By every rank of the machine, of which one says it."""
    config, driver = write_config(tmp_path, corpus, training__steps=1), tmp_path / "driver"
    driver.touch()
    first, second = end_ranks(start_blind, 2, str(config), str(driver), "12.8", None, process_group=False, timeout=60)
    assert (first.code, second.code) == (2, 2)
    assert re.fullmatch(BLIND, first.errors.strip()) and second.errors == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("driver", "cuda", "hidden", "code"),
    [
        ("driver", "12.8", "0,1", 2),
        ("driver", "12.8", "", 0),
        ("driver", "12.8", "-1", 0),
        ("driver", None, None, 0),
        ("none", "12.8", None, 0),
    ],
)
def test_a_machine_without_gpus_or_with_hidden_ones_trains_on_the_cpu(
    driver: str, cuda: str | None, hidden: str | None, code: int, corpus: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, corpus, training__steps=1)
    (tmp_path / "driver").touch()
    arguments = (str(config), str(tmp_path / driver), cuda, hidden)
    [outcome] = end_ranks(start_blind, 1, *arguments, process_group=False, timeout=60)
    assert outcome.code == code, outcome.errors


def left_alone(config: str) -> None:
    """Rank 0 opens the place to meet, and dies when rank 1 has come there."""
    if os.environ["RANK"] == "1":
        raise SystemExit(pretrain("--config", config))
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, is_master=True, wait_for_workers=False)
    # Whatever rank 1 asks of the store, it writes its own name there first.
    while store.num_keys() < 2:
        time.sleep(0.01)
    os._exit(9)


def test_a_rank_that_goes_before_all_have_met_is_told_in_a_line(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "corpus", parallel__data=2)
    _, outcome = end_ranks(left_alone, 2, str(config), process_group=False, timeout=60)
    assert outcome.code == 1
    # torch has its own word before.
    said = outcome.errors.splitlines()[-1]
    assert re.fullmatch(r"error: rank 1: the ranks did not meet at 127\.0\.0\.1:[0-9]+: .+", said)
    assert "Traceback" not in outcome.errors
    assert not (tmp_path / "run").exists()
