"""Refuses, before the first step, a run that would run out of memory at the adapter switch (rule R6)."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from slope_dist.config import Config, Derived
from slope_dist.config.resolve import zero_stage
from slope_dist.errors import UserError
from slope_dist.parallel.environment import Environment
from slope_dist.training.build import count_state
from slope_dist.training.progress import size_text


def refuse_what_will_not_fit(config: Config, derived: Derived, environment: Environment) -> None:
    """Compare the model state of each phase, and of the switch between them, with the memory of a rank.

    At the switch the old optimizer's state and the metadata wait in memory while the new engine is built. Activations
    are not counted: this refuses what is certain to fail, not all that will.

    Raises:
        UserError: with the bytes.
    """
    before, _ = count_state(config, derived, adapters=False)
    needs = {"the model state": before.bytes}
    if derived.adapter_steps:
        after, _ = count_state(config, derived, adapters=True)
        needs["the model state with adapters"] = after.bytes
        # At stage 0 the weights are the fp32 truth and wait too.
        waiting = before.optimizer + before.metadata + (before.weights if zero_stage(config) == 0 else 0)
        needs["the switch to adapters"] = after.bytes + waiting
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        where = torch.cuda.get_device_name()
    else:
        total = _machine_memory() // max(1, environment.local_world_size)
        where = "memory of the machine" + (" for each local rank" if environment.local_world_size > 1 else "")
    what = max(needs, key=lambda name: needs[name])
    if needs[what] > total:
        raise UserError(
            f"the run does not fit: {what} takes {size_text(needs[what])} on a rank, and there are {size_text(total)} "
            f"({where}); use more ranks with a higher parallel.zero_stage, or a smaller model"
        )


def _machine_memory() -> int:
    """Bytes of memory this process may use together with the others: the machine's, or its container's limit."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total
