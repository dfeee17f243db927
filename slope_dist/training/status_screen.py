"""A run's status for people: one screen. Without torch."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slope_dist.output import visible
from slope_dist.training.status import MEANINGS, CheckpointStatus, Goodput, Status
from slope_dist.transfer import duration_text, size_text

_MOST_PARTS = 4
_MOST_WARNINGS = 8
_MARKS = {"failed": "bold red", "killed": "bold red", "unclear": "yellow", "running": "green", "finished": "green"}


def as_json(status: Status) -> str:
    """All of a status, on lines of their own."""
    return json.dumps(asdict(status), indent=1, allow_nan=False)


def screen(status: Status) -> RenderableType:
    """A status as a table of facts, and what is to be looked at below it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts(status).items():
        style = _MARKS.get(status.state, "") if name == "state" else ""
        table.add_row(name, Text(visible(text), style=style))
    shown = status.warnings[:_MOST_WARNINGS]
    lines = [Text(f"warning: {visible(text)}", style="yellow") for text in shown]
    if len(status.warnings) > len(shown):
        lines.append(Text(f"and {len(status.warnings) - len(shown)} more warnings: see --json", style="yellow"))
    return Group(table, *lines)


def facts(status: Status) -> dict[str, str]:
    """What is known, by what it is called on the screen."""
    lines = {
        "run": status.folder,
        "state": f"{status.state}: {MEANINGS[status.state]}",
        "job": _job(status),
        "why": _why(status),
        "model": status.model or "",
        "layout": status.layout or "",
        "step": _step(status),
        "loss": _loss(status),
        "evaluation": _evaluation(status),
        "speed": _speed(status),
        "time left": "" if status.eta_seconds is None else duration_text(status.eta_seconds),
        "phase": _phase(status),
        "checkpoint": _checkpoint(status.checkpoint),
        "restarts": _restarts(status),
        "goodput": _goodput(status.goodput),
    }
    return {name: text for name, text in lines.items() if text}


def _job(status: Status) -> str:
    if status.host is None:
        return ""
    slurm = f", SLURM job {status.job}" if status.job else ""
    ranks = f", {status.ranks} ranks" if status.ranks is not None else ""
    return f"process {status.pid} on {status.host}{slurm}{ranks}"


def _why(status: Status) -> str:
    if not status.cause:
        return ""
    return status.cause + ("" if status.exit_code is None else f" (exit code {status.exit_code})")


def _step(status: Status) -> str:
    of = "" if status.steps is None else f" of {status.steps} ({100 * status.step / max(1, status.steps):.1f} %)"
    tokens = "" if status.tokens is None else f", {status.tokens:,} tokens"
    quiet = "" if status.quiet_seconds is None else f", the last {duration_text(status.quiet_seconds)} ago"
    return f"{status.step}{of}{tokens}{quiet}"


def _loss(status: Status) -> str:
    if status.mean_loss is None:
        return ""
    last = "not finite" if status.loss is None else f"{status.loss:.4f}"
    return f"{last}, mean of the last {status.mean_of} steps {status.mean_loss:.4f}"


def _evaluation(status: Status) -> str:
    found = status.evaluation
    if found is None:
        return ""
    names = {"eval_loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    return ", ".join(
        [f"after step {found['step']}", *(f"{text} {found[name]:.4f}" for name, text in names.items() if name in found)]
    )


def _speed(status: Status) -> str:
    if status.tokens_per_second is None or status.seconds_per_step is None:
        return ""
    mfu = "" if status.mfu is None else f", MFU {100 * status.mfu:.1f} %"
    return f"{status.tokens_per_second:,.0f} tokens/s, {status.seconds_per_step:.3g} s a step{mfu}"


def _phase(status: Status) -> str:
    if status.phase == "adapters" or status.first_adapter_step is None:
        return status.phase or ""
    return f"{status.phase or 'sparse'}, adapters join at step {status.first_adapter_step}"


def _checkpoint(found: CheckpointStatus | None) -> str:
    if found is None:
        return "none"
    verified = {None: "complete by its files' sizes (--verify reads them)", True: "verifies", False: "DOES NOT VERIFY"}
    age = duration_text(found.age_seconds)
    return f"{found.name}, {size_text(found.bytes)}, {age} old, {verified[found.verified]}"


def _restarts(status: Status) -> str:
    """How many, and how the last jobs before this one ended."""
    if not status.parts:
        return ""
    ended = status.parts[:-1][-_MOST_PARTS:]
    texts = []
    for part in ended:
        how = part["how"] or "killed"
        cause = f" ({part['cause']})" if part["cause"] else ""
        texts.append(f"from step {part['step']}: {how}{cause}")
    return "; ".join([str(status.restarts), *texts])


def _goodput(found: Goodput | None) -> str:
    if found is None:
        return ""
    return (
        f"{100 * found.share:.1f} %: {duration_text(found.step_seconds)} in steps that were kept, of "
        f"{duration_text(found.wall_seconds)} since the first start"
    )
