"""What a run needs at its worst, said by arithmetic, and the refusal, before the first step, of one that cannot fit.

At the adapter switch the old optimizer's state waits in host memory while the new engine is built, so a run that trains
may still die there (rule R6): on CPUs that is the memory it trains in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from slope_dist.config import Config, Derived, derive
from slope_dist.errors import UserError
from slope_dist.parallel.environment import Environment
from slope_dist.planning import GPU_MEMORY, ModelState
from slope_dist.planning.activations import PredictedTooLateError
from slope_dist.training.build import count_state, storage
from slope_dist.training.control_groups import memory_limits
from slope_dist.training.forecast import MARGIN, fits, forecast, most_of
from slope_dist.transfer import size_text


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of model state alone on the heaviest rank in each phase.

    Attributes:
        before: until the adapters join, or for the whole run where there are none.
        switch: while they join; None where there are none.
        waiting: host memory in which state waits while they join; 0 on CPUs, where that is part of `switch`.
        after: from then on; None where there are none.
        copy: host memory from which checkpoints are written beside training; 0 where training waits for them.
    """

    before: int
    switch: int | None
    waiting: int
    after: int | None
    copy: int

    def named(self) -> dict[str, int]:
        """What there is, by a name to put in a sentence."""
        found = {
            "the model state": self.before,
            "the model state with adapters": self.after,
            "the switch to adapters": self.switch,
        }
        return {name: size for name, size in found.items() if size is not None}

    @property
    def most(self) -> int:
        """The worst of it."""
        return max(self.named().values())


def needs_of(config: Config, derived: Derived, *, on_gpu: bool) -> Needs:
    """What the heaviest rank of a run needs; activations and communication buffers are not counted."""
    stored, ranks = storage(config, derived), derived.data_ranks
    copies = config.checkpoint.asynchronous
    without = count_state(config, derived, adapters=False).shares
    before = [ModelState.of(share, stored, ranks) for share in without]
    most = max(state.bytes for state in before)
    if not derived.adapter_steps:
        copy = copies * max(state.saved for state in before)
        return Needs(before=most, switch=None, waiting=0, after=None, copy=copy)
    with_adapters = count_state(config, derived, adapters=True).shares
    after = [ModelState.of(share, stored, ranks) for share in with_adapters]
    carried = [0 if on_gpu else state.carried for state in before]
    return Needs(
        before=most,
        switch=max(old + new.bytes for old, new in zip(carried, after, strict=True)),
        waiting=max(state.carried for state in before) if on_gpu else 0,
        after=max(state.bytes for state in after),
        copy=copies * max(state.saved for state in after),
    )


def fit_on_gpu(config: Config, derived: Derived) -> list[str]:
    """What to say of the memory of `parallel.gpu`: nothing where none is named."""
    gpu = config.parallel.gpu
    if gpu is None:
        return []
    memory, stages = GPU_MEMORY[gpu], forecast(config, derived, on_gpu=True)
    before = max(stage.before.bytes for stage in stages)
    phases = f"{size_text(before)} a rank at the peak"
    if stages[0].after is not None:
        waiting = max(stage.waiting for stage in stages)
        after = max(stage.after.bytes for stage in stages if stage.after is not None)
        phases += (
            f" before the adapters, {size_text(after)} with them, {size_text(waiting)} of the host while they join"
        )
    margin = f"{(MARGIN - 1):.0%}"
    text = f"{gpu} with {size_text(memory)}: {phases}; predicted, and {margin} of the peak is to stay free beside it"
    if fits(stages, memory):
        return [f"fits on {text}"]
    ranks = f"{derived.data_ranks} data rank{'' if derived.data_ranks == 1 else 's'}"
    may = "may" if most_of(stages) <= memory else "does"
    return [f"warning: {may} not fit, with {ranks}, on {text}; {_what_would_fit(config, derived, memory)}"]


def _what_would_fit(config: Config, derived: Derived, memory: int) -> str:
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    free = config.model_copy(update={"parallel": config.parallel.model_copy(update={"data": None})})
    for data in _possible_data_ranks(config):
        total = data * model_ranks
        if data > derived.data_ranks and fits(forecast(free, derive(free, total), on_gpu=True), memory):
            return f"{data} data ranks ({total} ranks in all) would fit"
    return f"no number of data ranks would fit; raise {_larger_splits(config)}, or take a smaller model"


def _larger_splits(config: Config) -> str:
    """The keys that still make a rank's share smaller."""
    parallel = config.parallel
    keys = ["parallel.tensor"]
    if parallel.engine == "deepspeed":
        if parallel.zero_stage <= 1:
            keys.append("parallel.pipeline")
        if parallel.zero_stage < (1 if parallel.pipeline > 1 else 3):
            keys.append("parallel.zero_stage")
    return " or ".join(keys)


def _possible_data_ranks(config: Config) -> Iterator[int]:
    """Those that divide the global batch, fewest first."""
    most = config.training.global_batch_size // config.training.micro_batch_size
    return (data for data in range(1, most + 1) if most % data == 0)


def refuse_what_will_not_fit(config: Config, derived: Derived, environment: Environment) -> None:
    """Compare what the heaviest rank needs with the memory that is there.

    This refuses what is certain to fail: a model state that is larger, and on a GPU a predicted peak that is larger by
    more than the prediction may be wrong. A CPU's memory ends less sharply, and there state alone decides.

    Raises:
        UserError: with the bytes.
    """
    on_gpu = torch.cuda.is_available()
    needs = needs_of(config, derived, on_gpu=on_gpu)
    named = needs.named()
    if on_gpu:
        for name, size in _certain_peaks(config, derived).items():
            named[name] = max(size, named.get(name, 0))
    machine = _machine_memory() // max(1, environment.local_world_size)
    machine_text = "memory of the machine" + (" for each local rank" if environment.local_world_size > 1 else "")
    total = torch.cuda.mem_get_info()[1] if on_gpu else machine
    where = torch.cuda.get_device_name() if on_gpu else machine_text
    what = max(named, key=lambda name: named[name])
    if named[what] > total:
        raise UserError(
            f"the run does not fit: {what} takes {size_text(named[what])} on a rank, and there are {size_text(total)} "
            f"({where}); use more ranks with a higher {_larger_splits(config)}, or a smaller model"
        )
    held = {"the copy from which checkpoints are written beside training": needs.copy}
    held |= {"the state that waits while adapters join": needs.waiting} if on_gpu else {what: named[what]}
    if sum(held.values()) > machine:
        takes = " and ".join(f"{size_text(size)} for {name}" for name, size in held.items() if size)
        advice = "set checkpoint.asynchronous false, or use more ranks" if needs.copy else "use more ranks"
        raise UserError(
            f"the run does not fit: a rank takes {takes}, and there are {size_text(machine)} ({machine_text}); {advice}"
        )


def _certain_peaks(config: Config, derived: Derived) -> dict[str, int]:
    """What the predicted peaks are at least; nothing where nobody predicted them before the process group was there."""
    try:
        stages = forecast(config, derived, on_gpu=True)
    except PredictedTooLateError:
        return {}
    peaks = {"training": max(stage.before.bytes for stage in stages)}
    if stages[0].after is not None:
        peaks["training with adapters"] = max(stage.after.bytes for stage in stages if stage.after is not None)
    return {name: int(size / MARGIN) for name, size in peaks.items()}


def _machine_memory() -> int:
    """Bytes of memory this process may use together with the others: the machine's, or a container's or job's limit."""
    return min([psutil.virtual_memory().total, *memory_limits()])
