"""Pictures of results: how much faster than dense."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slope_dist.benchmark import block, decode, gemm, refresh

MOST_LINES = 12
"""Of a panel; more cannot be told apart."""

Groups = list[tuple[str, dict[str, float]]]
"""Bars: a label on the axis, and heights by series."""


def draw(benchmark: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    """Draw the measured rows of a benchmark as a PNG; rows that say why nothing was measured are not in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "not_measured" not in row]
    panels = 2 if benchmark == "gemm" else 1
    figure, axes = pyplot.subplots(1, panels, figsize=(6 * panels + 2, 5), layout="constrained", squeeze=False)
    figure.suptitle(
        f"{benchmark}: {facts['device']}{' (CPU)' if facts['kind'] == 'cpu' else ''}, torch {facts['torch']}"
    )
    if benchmark == "gemm":
        for panel, kind in zip(axes[0], ("forward", "input gradient"), strict=True):
            _draw_products(panel, kind, [row for row in rows if row["kind"] == kind])
    elif benchmark == "refresh":
        _draw_bars(axes[0][0], _shares(rows), "share of the block's training step", None)
    elif benchmark == "decode":
        _draw_bars(axes[0][0], _uses(rows), "tokens a second, 2:4 over dense", 1.0)
    else:
        _draw_bars(axes[0][0], _speeds(rows), "time of dense over that of 2:4", 1.0)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    os.replace(partial, path)


def _draw_products(panel: Any, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Speed over dense by tokens, a line for each of the largest weights."""
    lines: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for row in rows:
        rival = row["rivals"].get(gemm.DISPATCHER) or row["rivals"][gemm.REFERENCE]
        lines.setdefault((row["rows"], row["columns"]), []).append((row["tokens"], 1 / rival["ratio"]))
    for (height, width), points in sorted(lines.items(), key=lambda line: -line[0][0] * line[0][1])[:MOST_LINES]:
        points.sort()
        panel.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=f"{height} x {width}")
    panel.axhline(1.0, color="#888888", lw=1.0, ls="--")
    panel.set(xlabel="tokens", ylabel="time of dense over that of 2:4", title=kind)
    if lines:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.legend(fontsize=7)
    panel.grid(alpha=0.25)


def _draw_bars(panel: Any, groups: Groups, label: str, line: float | None) -> None:
    series = list(dict.fromkeys(name for _, bars in groups for name in bars))
    width = 0.8 / max(1, len(series))
    for place, name in enumerate(series):
        heights = {group: bars[name] for group, (_, bars) in enumerate(groups) if name in bars}
        at = [group + width * (place - (len(series) - 1) / 2) for group in heights]
        panel.bar(at, list(heights.values()), width * 0.95, label=name)
    if line is not None:
        panel.axhline(line, color="#888888", lw=1.0, ls="--")
    panel.set_xticks(range(len(groups)), [name for name, _ in groups], rotation=30, ha="right", fontsize=8)
    panel.set_ylabel(label)
    panel.grid(alpha=0.25, axis="y")
    if series:
        panel.legend(fontsize=8)


def _speeds(rows: Sequence[Mapping[str, Any]]) -> Groups:
    sparse = [name for name in block.RIVALS if name != block.DENSE]
    return [(_label(row), {name: 1 / row["rivals"][name]["ratio"] for name in sparse}) for row in rows]


def _shares(rows: Sequence[Mapping[str, Any]]) -> Groups:
    refreshed = (refresh.TRANSPOSES, refresh.MASKS)
    return [(_label(row), {name: row["rivals"][name]["ratio"] for name in refreshed}) for row in rows]


def _label(row: Mapping[str, Any]) -> str:
    layers = f", {row['layers']} layers" if "layers" in row else ""
    return f"{row['config']}{layers}, {row['tokens']} tokens"


def _uses(rows: Sequence[Mapping[str, Any]]) -> Groups:
    return [
        (
            f"{row['config']}, r = {100 * row['rank_share']:g} %",
            {use: 1 / numbers[decode.SPARSE]["ratio"] for use, numbers in row["uses"].items()},
        )
        for row in rows
    ]
