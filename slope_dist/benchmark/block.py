"""A training step of one transformer block, dense beside 2:4: time, model state and peak memory."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from torch import nn

from slope_dist.benchmark import timing
from slope_dist.benchmark.checking import check_weight, one_of_each_shape
from slope_dist.benchmark.peaks import peaks_on
from slope_dist.benchmark.random_models import Form, build_block, factory, sparse_weights, with_layers
from slope_dist.benchmark.trainer import Trainer, forget_graphs
from slope_dist.config import Config
from slope_dist.errors import UserError
from slope_dist.planning.flops import count_flops, model_flops_utilization
from slope_dist.planning.shapes import shape_of
from slope_dist.training.build import build as build_model

DENSE, RESIDENT, DERIVED, ADAPTERS = "dense", "resident", "derived", "adapters"
RIVALS = (DENSE, RESIDENT, DERIVED, ADAPTERS)

PAPER_RANK = 0.0156
"""Of the adapters, as a share of the width, where a config gives none."""


def forms(config: Config) -> list[Form]:
    """The rivals, dense first; adapters stand beside weights with resident transposes."""
    rank = config.adapter_rank or config.adapters.model_copy(update={"rank": PAPER_RANK}).adapter_rank(
        config.model.hidden_size
    )
    return [
        Form(DENSE, sparse=False),
        Form(RESIDENT, sparse=True, resident=True),
        Form(DERIVED, sparse=True),
        Form(ADAPTERS, sparse=True, resident=True, adapter_rank=rank),
    ]


def batch_of(config: Config, tokens: int) -> tuple[int, int]:
    """Sequences and their length that make up `tokens`: the model's own length, if there are as many.

    Raises:
        UserError: if they do not.
    """
    length = min(tokens, config.model.sequence_length)
    if tokens % length:
        raise UserError(f"--tokens {tokens} is no multiple of {length}, the model's sequence length")
    return tokens // length, length


def trainer(config: Config, form: Form, tokens: int, device: torch.device, dtype: torch.dtype) -> Trainer:
    """A trainer of one block, on normal inputs and output gradients."""
    shape = (*batch_of(config, tokens), config.model.hidden_size)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    grad_y = torch.randn(shape, device=device).to(dtype)

    def backward(module: nn.Module) -> None:
        module(x).backward(grad_y)
        x.grad = None

    return Trainer(partial(build_block, config, form, device, dtype), backward, device)


def measure(
    name: str, config: Config, tokens: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Check the products of every sparse rival, then time all in turns for about `seconds`.

    Raises:
        WrongResultError: a sparse rival is wrong; nothing is timed.
    """
    forget_graphs()
    torch.manual_seed(0)
    numbers: dict[str, dict[str, Any]] = {}
    for form in forms(config):
        # Each alone, or the peak would be of all of them.
        alone = trainer(config, form, tokens, device, dtype)
        check(alone.module, tokens, f"block of {name}, {form.name}")
        numbers[form.name] = {
            "state_bytes": alone.state_bytes(),
            "peak_bytes": alone.peak_bytes(),
            "why_eager": alone.why_eager,
            "adapter_rank": form.adapter_rank,
        }
        del alone
        # Its compiled blocks refer to themselves; left there, they would count in what is measured of the next.
        gc.collect()
    trainers = {form.name: trainer(config, form, tokens, device, dtype) for form in forms(config)}
    timed = timing.in_turns({rival: made.step for rival, made in trainers.items()}, device, seconds)
    flops = flops_of_block(config, batch_of(config, tokens)[1])
    for rival, taken in timed.items():
        numbers[rival] |= (summary := taken.summary())
        speed = tokens / summary["seconds"]
        numbers[rival] |= {"tokens_per_second": speed, "mfu": utilization(flops, speed, device, dtype)}
    for found in numbers.values():
        found["host_excess"] = timing.host_excess(found, numbers[DENSE]["host_seconds"], device)
    return describe(name, config, tokens, dtype) | {"flops_per_token": flops, "rivals": numbers}


def flops_of_model(config: Config, length: int) -> int:
    """For a token, of the dense model, the basis of every rival's MFU, on sequences of this length."""
    model = build_model(config, factory(config, Form(DENSE, sparse=False), "meta"))
    return count_flops(model, shape_of(config.model), length).dense_equivalent


def flops_of_block(config: Config, length: int) -> int:
    """The same of one block: what a second one adds."""
    one, two = (flops_of_model(with_layers(config, layers), length) for layers in (1, 2))
    return two - one


def utilization(flops: int, speed: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """MFU of `speed` tokens/s, of a card's dense 16-bit peak; None where that is not known."""
    peaks = peaks_on(device, dtype)
    return None if peaks is None else model_flops_utilization(flops, speed, peaks.dense)


def describe(name: str, config: Config, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """What was measured, as plain data."""
    batch, length = batch_of(config, tokens)
    return {
        "config": name,
        "hidden_size": config.model.hidden_size,
        "ffn_size": config.model.ffn_size,
        "tokens": tokens,
        "batch": batch,
        "sequence_length": length,
        "dtype": str(dtype).removeprefix("torch."),
    }


def check(module: nn.Module, tokens: int, what: str) -> None:
    """Check one 2:4 weight of every shape in a module.

    Raises:
        WrongResultError: a product of one is wrong.
    """
    for weight in one_of_each_shape(sparse_weights(module)):
        check_weight(weight, tokens, f"{what}, {weight.shape[0]} x {weight.shape[1]}")
