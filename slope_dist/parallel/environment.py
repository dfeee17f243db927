"""Which rank this process is, from whatever launched it, and the process group that follows from it."""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from slope_dist.errors import UnfinishedError, UserError
from slope_dist.parallel.gpus import DRIVER, gpus_are_missed

Launcher = Literal["none", "deepspeed or torchrun", "srun"]

INIT_TIMEOUT = timedelta(minutes=30)
"""Long enough for rank 0 to prepare a corpus while the others wait."""

OWN_FILES = 256
"""Files that a process opens whatever the number of ranks: data, checkpoints, libraries."""

FILES_PER_RANK = {"nccl": 4, "gloo": 10}
"""And for each rank, by backend: every gloo group of n connects each of its ranks to the n - 1 others (counted at the
first of 4 and 8 ranks: 42 and 58 on data ranks alone, 153 and 181 with tensor ranks and a pipeline); of NCCL's, only
the store's and the peers' connections at the first rank are many."""

FILES_ANYWAY = 65536
"""Where the hard limit lets it, a process may open so many even if its ranks take fewer."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""With which cuBLAS gives the same bits each time; the second is the smaller and slower one."""


@dataclass(frozen=True)
class Environment:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0


def discover(variables: Mapping[str, str] | None = None) -> Environment:
    """Read the rank from the launcher's environment variables; none of them means one process.

    deepspeed and torchrun set RANK; srun sets SLURM_PROCID. A process inside a SLURM allocation that srun did not
    start as one task of several is a single one: a batch script and an interactive shell have SLURM_PROCID too.

    Raises:
        UserError: if the variables contradict each other.
    """
    env = os.environ if variables is None else variables
    if "RANK" in env:
        # torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE.
        local_size = "LOCAL_SIZE" if "LOCAL_SIZE" in env else "LOCAL_WORLD_SIZE"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_size)
        launcher: Launcher = "deepspeed or torchrun"
        defaults = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    elif "SLURM_PROCID" in env and _is_srun_step(env) and env.get(_srun_tasks(env), "1") != "1":
        names = ("SLURM_PROCID", _srun_tasks(env), "SLURM_LOCALID", "")
        launcher = "srun"
        # Read below, from whichever variable has it.
        defaults = {"SLURM_LOCALID": "0", "": "1"}
    else:
        return Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")
    try:
        rank, world_size, local_rank, local_world_size = (int(env.get(name, defaults.get(name, ""))) for name in names)
    except ValueError as error:
        shown = ", ".join(f"{name}={env.get(name, '(unset)')}" for name in names if name)
        raise UserError(f"the launcher's environment is not whole numbers: {shown}") from error
    if not 0 <= rank < world_size:
        raise UserError(f"the launcher says rank {rank} of {world_size}; ranks go from 0 to {world_size - 1}")
    if launcher == "srun":
        local_world_size = max(_srun_tasks_here(env), local_rank + 1)
    return Environment(rank, world_size, local_rank, local_world_size, launcher)


def _is_srun_step(env: Mapping[str, str]) -> bool:
    # SLURM numbers the steps that are none of srun's (a batch script, an interactive shell) from 2**32 downwards.
    step = env.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < 2**32 - 16


def _srun_tasks(env: Mapping[str, str]) -> str:
    # SLURM_NTASKS may be the job's, of which this step runs a part.
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"


def _srun_tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of the step on this node. Only SLURM_NTASKS_PER_NODE is what the user typed, and there if he did."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        # "4(x2),3": four on each of two nodes, three on the next.
        parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in env.get(name, "").split(",")]
        nodes = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
        if nodes and None not in parts:
            node = env.get("SLURM_NODEID", "0")
            return nodes[min(int(node) if node.isdecimal() else 0, len(nodes) - 1)]
    return 1


def ranks_on_these_cores(environment: Environment, variables: Mapping[str, str] | None = None) -> int:
    """How many local ranks share the cores that this process may use: one, where srun has bound it to its own."""
    env = os.environ if variables is None else variables
    own = env.get("SLURM_CPUS_PER_TASK", "")
    if environment.launcher == "srun" and own.isdecimal() and hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0)) <= int(own)
        return 1 if bound else environment.local_world_size
    return environment.local_world_size


def why_so_few(environment: Environment, variables: Mapping[str, str] | None = None) -> str:
    """The usual reason for fewer ranks than a run wants, where the variables speak for it; else ""."""
    env = os.environ if variables is None else variables
    # deepspeed, torchrun and srun, each in its own words.
    names = {"deepspeed or torchrun": ("CROSS_SIZE", "GROUP_WORLD_SIZE"), "srun": ("SLURM_STEP_NUM_NODES",), "none": ()}
    counts = [env[name] for name in names[environment.launcher] if env.get(name, "").isdecimal()]
    seen = int(counts[0]) if counts else environment.world_size // environment.local_world_size
    allocated = env.get("SLURM_JOB_NUM_NODES", "")
    more = allocated.isdecimal() and int(allocated) > seen
    # Without a hostfile deepspeed takes the machine it was started on, which may be all of the allocation.
    alone = seen == 1 and "CROSS_SIZE" in env and environment.launcher == "deepspeed or torchrun"
    if not more and (not alone or allocated.isdecimal()):
        return ""
    nodes = "one node" if seen == 1 else f"{seen} nodes"
    of_all = f" of the {allocated} in the SLURM allocation" if more else ""
    return f"the usual cause: the launcher saw {nodes}{of_all}; give deepspeed a --hostfile, or start with srun"


def meeting_point(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT, as far as they are set or follow from what srun says.

    Under srun rank 0 runs on the first node of the step, unless the user gave an arbitrary distribution; the port is
    drawn from the job's and the step's number, so that two jobs on a node do not meet.
    """
    env = os.environ if variables is None else variables
    found = {name: env[name] for name in ("MASTER_ADDR", "MASTER_PORT") if env.get(name)}
    first = _first_host(env.get("SLURM_STEP_NODELIST", ""))
    placed_by_hand = env.get("SLURM_DISTRIBUTION", "").startswith("arbitrary") or "SLURM_HOSTFILE" in env
    if first and not placed_by_hand:
        found.setdefault("MASTER_ADDR", first)
    job, step = env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID", "")
    if job.isdecimal() and step.isdecimal():
        # Below the ports that systems give out by themselves.
        found.setdefault("MASTER_PORT", str(20000 + (int(job) + int(step)) % 10000))
    return found


def _first_host(nodes: str) -> str:
    """The first of "gpu[003-005,9]-ib,login1": gpu003-ib. Empty where the list reads otherwise."""
    first = re.match(r"(?:[\w.-]|\[\d[\d,-]*\])+(?=,|$)", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else ""


class MeetingError(Exception):
    """There is no process group: one line that says where it was to be and why not."""


def allow_files(world_size: int, backend: Literal["nccl", "gloo"]) -> None:
    """Raise this process's soft limit of open files to what so many ranks take, and well beyond where it may.

    Raises:
        UserError: the hard limit is too low.
    """
    needed = OWN_FILES + FILES_PER_RANK[backend] * world_size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{socket.gethostname()}: {world_size} ranks need up to {needed} open files a process, and {hard} are "
            "allowed; raise the hard limit (ulimit -Hn) of what starts the ranks: LimitNOFILE for a service such as "
            "slurmd; under SLURM also srun --propagate=NONE, which leaves the limit of the shell behind"
        )
    # Not to the hard limit itself, which may be a thousand million: there are programs that close each file they might
    # have, and inherit it.
    wanted = max(needed, FILES_ANYWAY)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def start(environment: Environment, threads: int, *, deterministic: bool = False) -> None:
    """Make the default process group and set this process's device and CPU threads.

    Args:
        environment: from `discover`.
        threads: CPU threads of this process.
        deterministic: whether torch and cuBLAS compute alike each time, from here to `stop`.

    Raises:
        UserError: if the launcher has not said where ranks meet, or started more processes than there are GPUs, or
            torch sees none of the GPUs that are there, or this process may open too few files.
        UnfinishedError: if the port is in use.
        MeetingError: if another rank never came, or went before all were there.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    # Else every allocation is filled first, which is for finding reads of what was never written: tests do.
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]
    if deterministic and os.environ.get(CUBLAS_WORKSPACE) not in DETERMINISTIC_WORKSPACES:
        # cuBLAS reads it when the first product is computed on a GPU.
        os.environ[CUBLAS_WORKSPACE] = DETERMINISTIC_WORKSPACES[0]
    gpu = torch.cuda.is_available()
    if torch.version.cuda is not None and gpus_are_missed(gpu, DRIVER):
        # Days of training on CPUs are not what was meant. The machine's other ranks see as little, and refuse alike.
        raise UserError(
            f"{socket.gethostname()} has NVIDIA GPUs ({DRIVER}), and torch {torch.__version__} sees none of them: is "
            "the driver too old, or a GPU out of order (see nvidia-smi)? CUDA_VISIBLE_DEVICES= trains on the CPU"
        )
    # Every rank of the machine refuses, not only those without a GPU: the others would wait for them.
    processes = max(environment.local_world_size, environment.local_rank + 1)
    if gpu and processes > torch.cuda.device_count():
        shown = "; under srun each task must see all GPUs of its node" if environment.launcher == "srun" else ""
        raise UserError(
            f"{processes} processes have no GPU each: the machine has {torch.cuda.device_count()}; "
            f"launch at most so many processes{shown}"
        )
    if gpu:
        torch.cuda.set_device(environment.local_rank)
    # DeepSpeed refuses to start without it, whoever made the process group.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    backend: Literal["nccl", "gloo"] = "nccl" if gpu else "gloo"
    allow_files(environment.world_size, backend)
    if environment.launcher == "none":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        where = meeting_point() if environment.launcher == "srun" else os.environ
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not where.get(name)]
        if missing:
            raise UserError(
                f"{' and '.join(missing)} must be set for {environment.world_size} ranks to meet; under srun: export "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
            )
        os.environ.update({name: where[name] for name in ("MASTER_ADDR", "MASTER_PORT")})
        try:
            dist.init_process_group(
                backend, rank=environment.rank, world_size=environment.world_size, timeout=INIT_TIMEOUT
            )
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                where_to = f"{where['MASTER_ADDR']}:{where['MASTER_PORT']}"
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise MeetingError(f"the ranks did not meet at {where_to}: {reason}") from error
            # Whoever has it leaves sooner or later, and a job script draws another the next time.
            raise UnfinishedError(
                f"port {where['MASTER_PORT']}, where ranks are to meet, is in use on this machine (by another run?); "
                "give the launcher another --master_port, or set MASTER_PORT under srun"
            ) from error


def stop() -> None:
    """Leave the process group, if there is one, and let torch choose its algorithms again."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if dist.is_initialized():
        dist.destroy_process_group()
