"""Which rank this process is, from whatever launched it, and the process group that follows from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from slope_dist.errors import UserError

Launcher = Literal["none", "deepspeed or torchrun", "srun"]

INIT_TIMEOUT = timedelta(minutes=30)
"""Long enough for rank 0 to prepare a corpus while the others wait."""


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
    start (no SLURM_STEP_ID) is a single one.

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
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_NTASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
        launcher = "srun"
        defaults = {"SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    else:
        return Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")
    try:
        rank, world_size, local_rank, local_world_size = (int(env.get(name, defaults.get(name, ""))) for name in names)
    except ValueError as error:
        shown = ", ".join(f"{name}={env.get(name, '(unset)')}" for name in names)
        raise UserError(f"the launcher's environment is not whole numbers: {shown}") from error
    if not 0 <= rank < world_size:
        raise UserError(f"the launcher says rank {rank} of {world_size}; ranks go from 0 to {world_size - 1}")
    return Environment(rank, world_size, local_rank, local_world_size, launcher)


def start(environment: Environment, threads: int) -> None:
    """Make the default process group and set this process's device and CPU threads.

    Args:
        environment: from `discover`.
        threads: CPU threads of this process.

    Raises:
        UserError: if the launcher has not said where ranks meet, or started more processes than there are GPUs.
    """
    torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    if gpu and environment.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {environment.local_rank} has no GPU of its own: the machine has {torch.cuda.device_count()}; "
            "launch at most so many processes"
        )
    if gpu:
        torch.cuda.set_device(environment.local_rank)
    # DeepSpeed refuses to start without it, whoever made the process group.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    backend = "nccl" if gpu else "gloo"
    if environment.launcher == "none":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"{' and '.join(missing)} must be set for {environment.world_size} ranks to meet; under srun: export "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
            )
        dist.init_process_group(backend, rank=environment.rank, world_size=environment.world_size, timeout=INIT_TIMEOUT)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
