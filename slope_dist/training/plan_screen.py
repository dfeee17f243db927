"""A plan as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from slope_dist.config.resolve import layout_text
from slope_dist.planning.peaks import Peak
from slope_dist.planning.step_time import StepTime
from slope_dist.training.forecast import MARGIN, StageMemory
from slope_dist.training.plan import NOT_MODELLED, Form, Plan
from slope_dist.transfer import duration_text, size_text

_STATE = ("weights", "metadata", "transposes", "kernel_metadata", "gradients", "optimizer")
_TIME = (
    *("products", "attention", "memory", "transposes", "tensor", "pipeline", "bubble", "data", "optimizer"),
    "total",
)


def table_of(*columns: str) -> Table:
    """A table without lines; columns are aligned right, but the first and those of words, "form" and "why"."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and column not in ("form", "why") else "left")
    return table


def show(plan: Plan, console: Console, times: str) -> None:
    """Print all of a plan."""
    cluster, run = plan.cluster, plan.run
    console.print(
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu} ({size_text(cluster.memory)} each): "
        f"{layout_text(run.config, run.derived.data_ranks)} x {run.derived.accumulation_steps}, recompute "
        f"{run.config.training.recompute}",
        highlight=False,
        soft_wrap=True,
    )
    for form in _forms(plan):
        _memory(plan, form, console)
    console.print(times, highlight=False, soft_wrap=True)
    console.print(_times(_forms(plan)))
    console.print(_traffic(run))
    console.print(NOT_MODELLED, highlight=False, soft_wrap=True)


def _forms(plan: Plan) -> list[Form]:
    return [plan.run, *([] if plan.dense is None else [plan.dense])]


def _memory(plan: Plan, form: Form, console: Console) -> None:
    pattern = form.config.sparsity.pattern
    table = table_of(f"{pattern}: a rank of stage", *map(str, range(1, len(form.stages) + 1)))

    def row(name: str, values: Sequence[int | None], text: str | None = None) -> None:
        table.add_row(name, *(text or ("-" if value is None else size_text(value)) for value in values))

    stages = form.stages
    table.add_row("trained elements", *(f"{stage.trained / 1e6:,.1f} M" for stage in stages))
    for title, index in (("before", 0), ("with adapters", 1))[: 1 if stages[0].after is None else 2]:
        for kind in _STATE:
            row(f"{title}: {kind.replace('_', ' ')}", [getattr(stage.states[index], kind) for stage in stages])
        peaks = [_peak(stage, index) for stage in stages]
        row(f"{title}: buffers at the peak", [peak.buffers for peak in peaks])
        row(f"{title}: activations at the peak", [peak.activations for peak in peaks])
        row(f"{title}: peak", [peak.bytes for peak in peaks])
        table.add_row(f"{title}: is in", *(peak.moment for peak in peaks))
    if stages[0].switch is not None:
        row("while adapters join", [stage.switch for stage in stages])
        row("host memory while they join", [stage.waiting for stage in stages])
    row("host memory for checkpoints", [stage.copy for stage in stages])
    console.print(table)
    verdict = "fits" if plan.fits(form) else "may NOT fit" if form.most <= plan.cluster.memory else "does NOT fit"
    host = plan.cluster.gpus_per_node * max(stage.copy + stage.waiting for stage in stages)
    console.print(f"host memory of a node, checkpoints and the switch: {size_text(host)} at most", highlight=False)
    console.print(
        f"{pattern} {verdict}: {size_text(form.most)} of {size_text(plan.cluster.memory)} at most, "
        f"{MARGIN - 1:.0%} of the peak to stay free beside it",
        highlight=False,
        soft_wrap=True,
    )


def _peak(stage: StageMemory, index: int) -> Peak:
    found = stage.before if index == 0 else stage.after
    assert found is not None
    return found


def _times(forms: Sequence[Form]) -> Table:
    columns: list[tuple[str, Form, StepTime]] = []
    for form in forms:
        columns.append((form.config.sparsity.pattern, form, form.before))
        if form.after is not None:
            columns.append((f"{form.config.sparsity.pattern} with adapters", form, form.after))
    table = table_of("seconds of a step", *(title for title, _, _ in columns))
    for name in _TIME:
        table.add_row(name, *(f"{getattr(time, name):,.3f}" for _, _, time in columns))
    rates = [form.derived.tokens_per_step / time.total for _, form, time in columns]
    table.add_row("tokens/s", *(f"{rate:,.0f}" for rate in rates))
    table.add_row("MFU (dense-equivalent)", *(f"{form.mfu:.1%}" if t is form.before else "-" for _, form, t in columns))
    days = [f"{form.days:,.1f}" if time is form.before else "-" for _, form, time in columns]
    table.add_row("days of the whole run", *days)
    step = forms[0].before.total
    if len(forms) > 1:
        table.add_row("step beside dense", *(f"{time.total / forms[1].before.total:.2f}x" for _, _, time in columns))
    table.caption = f"a step of {forms[0].derived.tokens_per_step:,} tokens: {duration_text(step)}"
    return table


def _traffic(form: Form) -> Table:
    table = table_of("sent by a rank in a step", "how", "of", "times", "bytes sent", "stage")
    for number, sent in enumerate(form.traffic, start=1):
        if number not in (1, len(form.traffic)):
            # Those between are like the second at most.
            continue
        for message in sent:
            table.add_row(
                f"{message.group}: {message.what}",
                message.operation,
                size_text(message.bytes),
                f"{message.times:,}",
                size_text(message.sent),
                str(number),
            )
    return table
