"""What of a run is watched while it trains."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from slope_dist.config.fields import CountOrZero, Section

Seconds = Annotated[float, Field(ge=1.0, le=1e7)]


class WatchConfig(Section):
    """What is looked for beside training: hangs, slow ranks, and copies that are no longer equal."""

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
    straggler_interval: CountOrZero = Field(
        default=5,
        description="Steps between two measurements of every rank's own speed, of some milliseconds each; 0: none.",
    )
    straggler_threshold: float = Field(
        default=0.75,
        gt=0.0,
        lt=1.0,
        description="A rank is reported as slow where its score, its speed as a share of the median rank's, stays "
        "below this: 0.75 reports what takes a third longer than elsewhere, 0.85 what takes a sixth longer.",
    )
    drift_interval: CountOrZero = Field(
        default=500,
        description="Steps between two comparisons of what several ranks hold copies of, which must agree in every "
        "bit; also after the last step; 0: none.",
    )
    on_drift: Literal["warn", "stop"] = Field(
        default="warn",
        description='What follows when copies differ: "warn" reports it and trains on, "stop" also ends the run '
        "before the state is saved.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hang_timeout is not None and self.first_step_timeout < self.hang_timeout:
            raise ValueError(
                f"watch.first_step_timeout {self.first_step_timeout:g} is below watch.hang_timeout "
                f"{self.hang_timeout:g}, which later steps may take; raise it, or lower that"
            )
        return self
