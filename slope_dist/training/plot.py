"""The picture of a run: loss.png."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from operator import itemgetter
from pathlib import Path
from typing import Any

POINTS = 4096
"""Of a curve, at most: more are no longer seen in so many pixels, and take seconds to draw."""


def plot_losses(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training loss, its running mean, validation loss and the adapter switch from the rows of metrics.jsonl.

    Raises:
        OSError: if the file cannot be written; one that was there is then as it was.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    losses = [(row["step"], row["loss"]) for row in steps]
    axes.plot(*_thinned(losses), color="#b8c4d6", lw=0.8, label="training")
    mean, means = None, []
    for step, loss in losses:
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        means.append((step, mean))
    axes.plot(*_thinned(means), color="#1f4e8c", lw=1.6, label="training, running mean")
    axes.plot(
        *_thinned([(row["step"], row["eval_loss"]) for row in evaluations]),
        color="#c44e1c",
        marker="o",
        lw=1.2,
        label="validation",
    )
    for row in evaluations[-1:]:
        axes.annotate(
            f"perplexity {row['perplexity']:.1f}",
            (row["step"], row["eval_loss"]),
            xytext=(0, -18),
            textcoords="offset points",
            ha="right",
            color="#c44e1c",
        )
    first_adapter = next((row["step"] for row in steps if row["phase"] == "adapters"), None)
    if first_adapter is not None:
        axes.axvline(first_adapter, color="#3c8d4f", ls="--", lw=1.2, label="adapters join")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    # A folder's name is no mathematics, whatever dollars it has.
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    except OSError:
        # A part of a picture is of no use, and takes room.
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        pyplot.close(figure)


def _thinned(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and values of at most POINTS points: of each stretch of steps the lowest and the highest, so peaks stay."""
    if len(points) > POINTS:
        stretch = ceil(2 * len(points) / POINTS)
        parts = (points[start : start + stretch] for start in range(0, len(points), stretch))
        ends = ({min(part, key=itemgetter(1)), max(part, key=itemgetter(1))} for part in parts)
        points = [point for pair in ends for point in sorted(pair)]
    return [step for step, _ in points], [value for _, value in points]
