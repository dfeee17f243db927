"""A plan: what a run takes on a cluster, 2:4 beside dense, as plain data and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from slope_dist.config import Config, Derived, derive
from slope_dist.planning.cluster import Cluster
from slope_dist.planning.flops import count_flops, model_flops_utilization
from slope_dist.planning.products import ProductTimes
from slope_dist.planning.shapes import shape_of
from slope_dist.planning.step_time import StepTime
from slope_dist.planning.traffic import Message
from slope_dist.training.build import build, layer_factory
from slope_dist.training.forecast import (
    MARGIN,
    StageMemory,
    fits,
    forecast,
    most_of,
    predict_step,
    predict_traffic,
)

NOT_MODELLED = (
    "not modelled: host time and kernel launches, latency of small collectives, power limits, slow ranks, reading "
    "data, evaluation, checkpoints and restarts; memory of the CUDA context, of NCCL and lost to fragments is what the "
    f"{MARGIN - 1:.0%} are for"
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """The run in one form, 2:4 or dense.

    Attributes:
        config: of it.
        derived: for the ranks of the cluster.
        stages: memory of a rank of each pipeline stage.
        before: time of a step until the adapters join.
        after: from then on; None where there are none.
        traffic: what a rank of each stage sends in a step before the adapters.
        mfu: of a step before the adapters, on the basis of dense-equivalent operations.
    """

    config: Config
    derived: Derived
    stages: tuple[StageMemory, ...]
    before: StepTime
    after: StepTime | None
    traffic: tuple[tuple[Message, ...], ...]
    mfu: float

    @property
    def most(self) -> int:
        """Bytes of the fullest rank at its fullest."""
        return most_of(self.stages)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks, before the adapters."""
        return self.derived.tokens_per_step / self.before.total

    @property
    def days(self) -> float:
        """Of all steps, without a pause."""
        late = self.derived.adapter_steps if self.after is not None else 0
        seconds = (self.config.training.steps - late) * self.before.total
        if self.after is not None:
            seconds += late * self.after.total
        return seconds / 86_400


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a cluster.

    Attributes:
        cluster: the machines.
        basis: where the times of products come from.
        measured: whether that is a measurement.
        run: as it is configured.
        dense: with dense weights and no adapters; None where it is that already.
    """

    cluster: Cluster
    basis: str
    measured: bool
    run: Form
    dense: Form | None

    def fits(self, form: Form) -> bool:
        """Whether every rank leaves the margin free."""
        return fits(form.stages, self.cluster.memory)


def make_plan(config: Config, cluster: Cluster, times: ProductTimes, *, measured: bool) -> Plan:
    """Plan a run on all GPUs of a cluster.

    Raises:
        UserError: if its layout does not fit so many ranks.
    """
    dense = None
    if config.sparsity.group is not None:
        dense = _form(_as_dense(config), cluster, times)
    return Plan(cluster=cluster, basis=times.basis, measured=measured, run=_form(config, cluster, times), dense=dense)


def _as_dense(config: Config) -> Config:
    sparsity = config.sparsity.model_copy(
        update={"pattern": "dense", "layer_patterns": (), "backward_weight": "auto", "column_mask_interval": 1}
    )
    return config.model_copy(update={"sparsity": sparsity})


def _form(config: Config, cluster: Cluster, times: ProductTimes) -> Form:
    derived = derive(config, cluster.gpus, "--nodes x --gpus-per-node")
    before = predict_step(config, derived, cluster, times, adapters=False)
    after = predict_step(config, derived, cluster, times, adapters=True) if derived.adapter_steps else None
    model = build(config, layer_factory(config, derived, adapters=False, device="meta"))
    flops = count_flops(model, shape_of(config.model)).dense_equivalent
    rate = derived.tokens_per_step / before.total
    return Form(
        config=config,
        derived=derived,
        stages=forecast(config, derived, on_gpu=True),
        before=before,
        after=after,
        traffic=tuple(map(tuple, predict_traffic(config, derived))),
        mfu=model_flops_utilization(flops, rate, cluster.peaks.dense, cluster.gpus),
    )


def to_data(plan: Plan) -> dict[str, Any]:
    """All of it, for programs: bytes and seconds."""
    return {
        "cluster": asdict(plan.cluster),
        "products": {"basis": plan.basis, "measured": plan.measured},
        "margin": MARGIN,
        "run": _form_data(plan, plan.run),
        "dense": None if plan.dense is None else _form_data(plan, plan.dense),
        "not_modelled": NOT_MODELLED,
    }


def _form_data(plan: Plan, form: Form) -> dict[str, Any]:
    return {
        "pattern": form.config.sparsity.pattern,
        "fits": plan.fits(form),
        "bytes": form.most,
        "stages": [_stage_data(stage) for stage in form.stages],
        "step": asdict(form.before) | {"total": form.before.total},
        "step_with_adapters": None if form.after is None else asdict(form.after) | {"total": form.after.total},
        "tokens_per_second": form.tokens_per_second,
        "mfu": form.mfu,
        "days": form.days,
        "traffic": [[asdict(message) | {"sent": message.sent} for message in sent] for sent in form.traffic],
    }


def _stage_data(stage: StageMemory) -> dict[str, Any]:
    return {
        "trained_elements": stage.trained,
        "before": asdict(stage.before) | {"bytes": stage.before.bytes},
        "switch": stage.switch,
        "switch_in_host_memory": stage.waiting,
        "after": None if stage.after is None else asdict(stage.after) | {"bytes": stage.after.bytes},
        "states": [asdict(state) | {"bytes": state.bytes} for state in stage.states],
        "host_copy": stage.copy,
        "bytes": stage.most,
    }
