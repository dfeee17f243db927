"""The picture of a run: loss.png."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


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
    axes.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="#b8c4d6", lw=0.8, label="training")
    mean, means = None, []
    for row in steps:
        mean = row["loss"] if mean is None else 0.9 * mean + 0.1 * row["loss"]
        means.append(mean)
    axes.plot([row["step"] for row in steps], means, color="#1f4e8c", lw=1.6, label="training, running mean")
    axes.plot(
        [row["step"] for row in evaluations],
        [row["eval_loss"] for row in evaluations],
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
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
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
