"""What a checkpoint says of a run beside its tensors, with every type checked before anything is done with it.

A manifest's hashes show that it is as it was written, not that a run wrote it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slope_dist.checkpoint import Checkpoint
from slope_dist.errors import UserError

Count = Annotated[int, Field(ge=0, le=2**62)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Fingerprint(_Strict):
    """See `slope_dist.training.fingerprint`."""

    loss: float | None
    samples: Count
    tolerance: Annotated[float, Field(ge=0, le=1)]
    made_by: dict[str, str | int | bool | None]


class LossScale(_Strict):
    """fp16's scaler, as DeepSpeed counts."""

    cur_scale: Annotated[float, Field(gt=0)]
    cur_iter: Count
    last_overflow_iter: Annotated[int, Field(ge=-1)]
    cur_hysteresis: Count


class RunState(_Strict):
    """The scalars of a checkpoint.

    Attributes:
        optimizer_steps: Adam's step counter of each parameter group.
        loss_scale: fp16 only.
        seed: `run.seed`; with the step, the whole state of every generator and of the sampler.
        next_sample: number of the first sample of the next step.
        adapters: whether they have joined.
        adapter_rank: their rank, also while they have not.
        first_adapter_step: the step at which they join or have joined.
        skipped_steps: steps whose gradients were not finite.
        skipped_in_a_row: those of them since the last good one.
        tokens: read so far.
        fingerprint: the loss of a fixed batch.
    """

    optimizer_steps: dict[str, Count]
    loss_scale: LossScale | None = None
    seed: Count
    next_sample: Count
    adapters: bool
    adapter_rank: Count
    first_adapter_step: Count
    skipped_steps: Count
    skipped_in_a_row: Count
    tokens: Count
    fingerprint: Fingerprint


def state_of(checkpoint: Checkpoint) -> RunState:
    """The scalars of a checkpoint.

    Raises:
        UserError: naming what is missing, too much, or of another type.
    """
    try:
        state = RunState.model_validate(dict(checkpoint.scalars))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, ("scalars", *first["loc"])))
        raise UserError(f"{checkpoint.path}: {where}: {first['msg']}; no run of this program wrote that") from None
    groups = {"decay", "no_decay"} | ({"adapters"} if state.adapters else set())
    steps = state.optimizer_steps
    if steps.keys() != groups or max(steps.values()) > checkpoint.step:
        raise UserError(
            f"{checkpoint.path}: scalars.optimizer_steps: expected a counter of at most {checkpoint.step} for each of "
            f"{', '.join(sorted(groups))}, found {str(steps)[:200]}; no run of this program wrote that"
        )
    return state


def training_steps_of(checkpoint: Checkpoint) -> int:
    """`training.steps` of the run that wrote a checkpoint.

    Raises:
        UserError: if its config does not say.
    """
    training: Any = checkpoint.config.get("training")
    steps = training.get("steps") if isinstance(training, dict) else None
    if type(steps) is not int:
        raise UserError(f"{checkpoint.path}: config.training.steps is not there; no run of this program wrote that")
    return steps
