"""What the transposes and column masks of a block take, as a share of its training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slope_dist.benchmark import block, timing
from slope_dist.benchmark.checking import one_of_each_shape
from slope_dist.benchmark.random_models import Form, build_block, sparse_weights
from slope_dist.benchmark.trainer import forget_graphs
from slope_dist.config import Config
from slope_dist.sparse import SparseWeight

STEP, TRANSPOSES, MASKS = "step", "transposes", "column masks"

RESIDENT = Form(block.RESIDENT, sparse=True, resident=True)


def measure(
    name: str, config: Config, tokens: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Time a step, all its refreshes and those of each shape, in turns; the ratio of each is its share of the step.

    A step has its transposes in it; it has the column masks too where `sparsity.column_mask_interval` is above 1 and
    the step is one of those that refresh them.

    Raises:
        WrongResultError: a product over a refreshed weight is wrong; nothing is timed.
    """
    forget_graphs()
    torch.manual_seed(0)
    trained = block.trainer(config, RESIDENT, tokens, device, dtype)
    held = build_block(config, RESIDENT, device, dtype, hold_column_mask=True)
    for module in (trained.module, held):
        block.check(module, tokens, f"refresh of {name}")
    weights, holding = sparse_weights(trained.module), sparse_weights(held)
    turns: dict[str, Callable[[], object]] = {
        STEP: trained.step,
        TRANSPOSES: lambda: _transpose(weights),
        MASKS: lambda: _refresh(holding),
    }
    shapes = {}
    for one, other in zip(one_of_each_shape(weights), one_of_each_shape(holding), strict=True):
        shape = f"{one.shape[0]} x {one.shape[1]}"
        shapes[shape] = sum(weight.shape == one.shape for weight in weights)
        turns[f"transpose {shape}"] = lambda one=one: _transpose([one])  # type: ignore[misc]
        turns[f"column mask {shape}"] = lambda other=other: _refresh([other])  # type: ignore[misc]
    timed = timing.in_turns(turns, device, seconds)
    return block.describe(name, config, tokens, dtype) | {
        "rivals": {rival: taken.summary() for rival, taken in timed.items()},
        "shapes": shapes,
        "why_eager": trained.why_eager,
    }


def _transpose(weights: Sequence[SparseWeight]) -> None:
    for weight in weights:
        weight.values_changed()
        weight.transpose()


def _refresh(weights: Sequence[SparseWeight]) -> None:
    for weight in weights:
        weight.refresh_column_mask()
