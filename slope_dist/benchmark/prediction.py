"""What the planner would have said of measured steps: `block` and `step` of a card, beside slope_dist/planning.

The benchmarks train on one rank: one micro-batch a step, AdamW on fp32 masters that it owns whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slope_dist.benchmark import block
from slope_dist.benchmark.random_models import Form, build_meta_layers, with_layers
from slope_dist.config import Config
from slope_dist.config.sections import Precision
from slope_dist.errors import UserError
from slope_dist.planning.model_state import measure
from slope_dist.planning.products import read_results
from slope_dist.planning.step_time import Machine, Work, block_work, edge_work, optimizer_seconds

CLOSE = 0.15
"""A prediction is good that is off by no more than this share of what was measured."""


@dataclass(frozen=True)
class Prediction:
    """One measured rival of one cell.

    Attributes:
        cell: its key in the file.
        rival: which.
        measured: seconds of a step.
        predicted: the same by the planner.
    """

    cell: str
    rival: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def is_close(self) -> bool:
        """Whether it is good."""
        return abs(self.ratio - 1) <= CLOSE


def predict_step(config: Config, tokens: int, form: Form, machine: Machine, *, whole: bool) -> float:
    """Seconds of one step of a block, or of a whole model, as the benchmarks take it.

    Args:
        config: of the model, in the precision that is measured; its blocks count where it is `whole`.
        tokens: of the micro-batch, all of the step.
        form: how linears are stored.
        machine: products and peaks of the card.
        whole: the model with its embedding and head, else its second block.
    """
    batch, length = block.batch_of(config, tokens)
    one = config.model_copy(
        update={
            "model": config.model.model_copy(update={"sequence_length": length}),
            # A block that is measured alone is not run again in backward.
            "training": config.training.model_copy(
                update={"micro_batch_size": batch} | ({} if whole else {"recompute": "none"})
            ),
            # What is measured: weights and gradients of one dtype on one rank.
            "parallel": config.parallel.model_copy(
                update={"tensor": 1, "sequence_parallel": False, "gradient_dtype": "model", "zero_stage": 1}
            ),
        }
    )
    layers = build_meta_layers(one, form, whole=whole)
    blocks, edges = (layers[1:-1], [layers[0], layers[-1]]) if whole else (layers, [])
    work = sum((block_work(layer, one, machine, resident=form.resident) for layer in blocks), Work())
    work = sum((edge_work(edge, one, machine) for edge in edges), work)
    share = measure(nn.ModuleList(layers))
    return work.seconds + optimizer_seconds(share, one, 1, machine.peaks, resident=form.resident)


def compare(
    path: Path, benchmark: str, configs: dict[str, Config], gpu: str, machine: Machine, precision: Precision = "bf16"
) -> Iterator[Prediction]:
    """Predict every rival in a file of `block` or `step` that was measured in a precision.

    Args:
        path: of the file.
        benchmark: which of the two.
        configs: the models that cells can name.
        gpu: the kind of card that the file was measured on.
        machine: its products and peaks.
        precision: of the rows that count.

    Raises:
        UserError: if the file cannot be read, is of another card or precision, or names a model that is not among
            `configs`.
    """
    for row in read_results(path, benchmark, gpu, precision)["rows"]:
        yield from _row(path, row, benchmark, configs, machine, precision)


def _row(
    path: Path,
    row: dict[str, Any],
    benchmark: str,
    configs: dict[str, Config],
    machine: Machine,
    precision: Precision,
) -> Iterator[Prediction]:
    try:
        cell, name, tokens, rivals = row["cell"], row["config"], int(row["tokens"]), row["rivals"]
        if name not in configs:
            raise UserError(f'{path}: cell "{cell}" is of the model {name}, which is not in configs/')
        config = configs[name].model_copy(update={"precision": precision})
        whole = benchmark == "step"
        if whole:
            config = with_layers(config, int(row["layers"]))
        for form in block.forms(config):
            if form.name in rivals:
                seconds = float(rivals[form.name]["seconds"])
                yield Prediction(cell, form.name, seconds, predict_step(config, tokens, form, machine, whole=whole))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error
