"""What the GPU benchmarks of tools/benchmark.py measured, as tables for a reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from slope_dist.benchmark import block, decode, gemm, refresh

WIDTH = 140
GB = 10**9

Rows = Sequence[dict[str, Any]]
Facts = dict[str, Any]

_X = "x: median of the ratios to dense, round by round, with quartiles; below 1 is faster."

_TRAINING = ("ms", "x", "state GB", "x", "peak GB", "x", "host ms", "more", "eager")

_MFU = (
    "MFU: what the dense model computes for these tokens, of the card's dense 16-bit peak, for every rival alike; - "
    "where that is not known. "
)

_HOST = (
    "host: until the host has launched a step; more: than it takes for dense, of the step's time, - on the CPU; where "
    "the GPU's queue is full the host waits for it, in either. "
)


def gemm_table(rows: Rows, facts: Facts) -> Table:
    """A line for each product: dense, the dispatcher and each route alone."""
    table = _table(
        "products of one weight",
        facts,
        f"{_X} TFLOPS count a 2:4 product as a dense one. bound: of the time that the card's peaks allow, how much was "
        "used; - where they are not known. Up to 32 tokens the L2 cache is emptied before each call.",
        ("product", "O x I", "tokens", "dense us", "TFLOPS", "bound", "2:4 x", "TFLOPS", "bound", "alone x", "chosen"),
    )
    for row in rows:
        first = (row.get("kind", row["cell"]), f"{row.get('rows')} x {row.get('columns')}", str(row.get("tokens")))
        if _skipped(table, row):
            continue
        rivals = row["rivals"]
        dense = rivals[gemm.DENSE]
        main = gemm.DISPATCHER if gemm.DISPATCHER in rivals else gemm.REFERENCE
        others = [f"{name} {rival['ratio']:.2f}" for name, rival in rivals.items() if name not in (gemm.DENSE, main)]
        ours = rivals[main]
        table.add_row(
            *first,
            f"{dense['seconds'] * 1e6:.1f}",
            f"{dense['tflops']:.3g}",
            _bound(dense),
            _ratio(ours),
            f"{ours['tflops']:.3g}",
            _bound(ours),
            ", ".join(others),
            row["choice"].get("label", main),
        )
    return table


def block_table(rows: Rows, facts: Facts) -> Table:
    """A line for each rival of each block."""
    table = _table(
        "a training step of one transformer block: forward, backward, AdamW on fp32 masters",
        facts,
        f"{_X} {_MFU}state: weights, metadata, transposes, gradients, masters, moments. peak: of a step, measured; - "
        f"on the CPU. {_HOST}eager: why torch.compile did not take it.",
        ("model", "tokens", "", "tokens/s", "MFU", *_TRAINING),
    )
    for row in rows:
        if not _skipped(table, row):
            _training_rows(table, row, (row["config"], str(row["tokens"])))
    return table


def step_table(rows: Rows, facts: Facts) -> Table:
    """A line for each rival of each model."""
    table = _table(
        "a training step of a whole model, or of the layers that fit",
        facts,
        f"Rivals one after another, dense first and last; x: time over the mean of the two. {_MFU}What is recomputed "
        "is not counted. state, peak and host as of a block.",
        ("model", "layers", "tokens", "", "tokens/s", "MFU", *_TRAINING),
    )
    for row in rows:
        if not _skipped(table, row):
            again = "" if row["recompute"] == "none" else ", recomputed"
            first = (row["config"], f"{row['layers']} of {row['layers_of_model']}{again}", str(row["tokens"]))
            _training_rows(table, row, first)
    return table


def _training_rows(table: Table, row: dict[str, Any], first: tuple[str, ...]) -> None:
    dense = row["rivals"][block.DENSE]
    for name, rival in row["rivals"].items():
        mfu = "-" if rival["mfu"] is None else f"{100 * rival['mfu']:.1f} %"
        peak = ("-", "-")
        if rival["peak_bytes"] is not None:
            peak = (f"{rival['peak_bytes'] / GB:.3f}", f"{rival['peak_bytes'] / dense['peak_bytes']:.3f}")
        label = f"{name}, rank {rival['adapter_rank']}" if rival["adapter_rank"] else name
        table.add_row(
            *first,
            label,
            f"{rival['tokens_per_second']:.0f}",
            mfu,
            f"{rival['seconds'] * 1e3:.2f}",
            _ratio(rival),
            f"{rival['state_bytes'] / GB:.3f}",
            f"{rival['state_bytes'] / dense['state_bytes']:.3f}",
            *peak,
            f"{rival['host_seconds'] * 1e3:.2f}",
            "-" if rival["host_excess"] is None else f"{100 * rival['host_excess']:.1f} %",
            rival["why_eager"] or "",
        )
        first = ("",) * len(first)


def refresh_table(rows: Rows, facts: Facts) -> Table:
    """A line for each refresh of each block."""
    table = _table(
        "refreshes of a block beside its training step with resident transposes",
        facts,
        "share: median of the ratios to the step, round by round, with quartiles. A step has its transposes in it. "
        "Column masks are refreshed every sparsity.column_mask_interval steps where that is above 1, else with the "
        "transposes.",
        ("model", "tokens", "", "in a block", "ms", "share"),
    )
    for row in rows:
        if _skipped(table, row):
            continue
        first = (row["config"], str(row["tokens"]))
        for name, rival in row["rivals"].items():
            count = next((count for shape, count in row["shapes"].items() if name.endswith(f" {shape}")), 1)
            share = "" if name == refresh.STEP else _ratio(rival, 4)
            table.add_row(*first, name, str(count), f"{rival['seconds'] * 1e3:.3f}", share)
            first = ("", "")
    return table


def decode_table(rows: Rows, facts: Facts) -> Table:
    """A line for each use of each model."""
    table = _table(
        "inference, 2:4 beside dense",
        facts,
        f"{_X} Dense has no adapters: they would be added in. memory: weights, metadata and adapters of the whole "
        "model. graph: why a step of writing was no CUDA graph.",
        ("model", "layers", "adapters", "memory GB", "x", "", "dense tokens/s", "2:4 tokens/s", "x", "graph"),
    )
    for row in rows:
        if _skipped(table, row):
            continue
        first: tuple[str, ...] = (
            row["config"],
            f"{row['layers']} of {row['layers_of_model']}",
            f"{100 * row['rank_share']:g} % ({row['adapter_rank']})",
            f"{row['resident_bytes'][decode.SPARSE] / GB:.3f}",
            f"{row['memory_ratio']:.3f}",
        )
        for use, numbers in row["uses"].items():
            dense, sparse = numbers[decode.DENSE], numbers[decode.SPARSE]
            label = f"{use} {row['prompts']} x {row['prompt']}" if use == "prefill" else f"{use} at {row['prompt']}"
            speeds = (f"{rival['tokens_per_second']:.0f}" for rival in (dense, sparse))
            table.add_row(*first, label, *speeds, _ratio(sparse), sparse.get("why_no_graph") or "")
            first = ("",) * len(first)
    return table


TABLES: dict[str, Callable[[Rows, Facts], Table]] = {
    "gemm": gemm_table,
    "block": block_table,
    "step": step_table,
    "refresh": refresh_table,
    "decode": decode_table,
}


def _table(what: str, facts: Facts, caption: str, headings: Sequence[str]) -> Table:
    where = facts["device"]
    if facts["kind"] == "cpu":
        where += f" (CPU, {facts['threads']} threads; says nothing of a GPU)"
    else:
        where += f", driver {facts.get('driver')}, {facts.get('vendors')}"
    table = Table(title=f"{what}, {where}, torch {facts['torch']}", caption=caption)
    for heading in headings:
        table.add_column(heading, justify="right" if heading[-2:] in ("ms", "us", "GB", "/s") else "left")
    return table


def _skipped(table: Table, row: dict[str, Any]) -> bool:
    if "not_measured" in row:
        table.add_row(row["cell"], f"not measured: {row['not_measured']}")
        return True
    return False


def _ratio(rival: dict[str, float], digits: int = 2) -> str:
    text = f"{rival['ratio']:.{digits}f}"
    if "ratio_q1" not in rival:
        return text
    return f"{text} ({rival['ratio_q1']:.{digits}f}-{rival['ratio_q3']:.{digits}f})"


def _bound(rival: dict[str, float]) -> str:
    return f"{100 * rival['bound_share']:.0f} %" if "bound_share" in rival else "-"
