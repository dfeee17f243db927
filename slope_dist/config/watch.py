"""The section on hangs: how long a run may stand still."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from slope_dist.config.fields import Section

Seconds = Annotated[float, Field(ge=1.0, le=1e7)]


class WatchConfig(Section):
    """How long a run may get on with nothing before it is ended, so that whatever started it can start it again."""

    hang_timeout: Seconds | None = Field(
        default=600.0,
        description="Seconds without a step, a batch of an evaluation or a piece of a checkpoint, on any rank, after "
        "which the run has hung: what a collective may take before torch's NCCL gives up, and far above the slowest "
        "step of a run that is worth its GPUs. null: hangs are not looked for.",
    )
    first_step_timeout: Seconds = Field(
        default=3600.0,
        description="The same before the first step is done, around the adapters' start, for what is done for the "
        "first time, and while a checkpoint is waited for: kernels are compiled, files read, ranks connected. At least "
        "`hang_timeout`.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hang_timeout is not None and self.first_step_timeout < self.hang_timeout:
            raise ValueError(
                f"watch.first_step_timeout {self.first_step_timeout:g} is below watch.hang_timeout "
                f"{self.hang_timeout:g}, which later steps may take; raise it, or lower that"
            )
        return self
