"""What of a run is watched while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slope_dist.config.fields import CountOrZero, Section


class WatchConfig(Section):
    """What is looked for beside training: slow ranks, and copies that are no longer equal."""

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
