"""A training step of a whole model, with as many of its blocks as fit, dense beside 2:4."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from torch import nn

from slope_dist.benchmark import block, timing
from slope_dist.benchmark.cells import NotMeasuredError
from slope_dist.benchmark.random_models import Form, build_language_model, factory, with_layers
from slope_dist.benchmark.trainer import Trainer, forget_graphs
from slope_dist.config import Config
from slope_dist.models import LanguageModel
from slope_dist.planning import measure as measure_share
from slope_dist.training.build import build as build_model

DENSE_AGAIN = "dense, again"
"""Two models do not fit beside each other, so rivals are timed one after another, and dense at both ends."""

STATE_BYTES = 16
"""Of a dense element: 16-bit weight and gradient, fp32 master and two moments."""

STATE_SHARE = 0.85
"""Of the memory; the rest is for activations, as far as it goes: that is found by trying."""


def most_layers(config: Config, memory: int) -> int:
    """How many blocks a dense model can have for its state to fit, by counting; 1 at least."""

    def state(layers: int) -> int:
        small = with_layers(config, layers)
        return (
            STATE_BYTES
            * measure_share(build_model(small, factory(small, Form("dense", sparse=False), "meta"))).elements
        )

    first, each = state(1), state(2) - state(1)
    return max(1, min(config.model.num_layers, 1 + int((memory * STATE_SHARE - first) // each)))


def trainer(config: Config, form: Form, tokens: int, device: torch.device, dtype: torch.dtype) -> Trainer:
    """A trainer of a whole model on random tokens."""
    ids = torch.randint(config.model.vocab_size, (2, *block.batch_of(config, tokens)), device=device)

    def backward(model: nn.Module) -> None:
        model(ids[0], ids[1]).backward()

    build = partial(build_language_model, config, form, device, dtype)
    return Trainer(build, backward, device, blocks=_blocks)


def _blocks(model: nn.Module) -> list[nn.Module]:
    assert isinstance(model, LanguageModel)
    return model.blocks


def layers_that_fit(config: Config, tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """The most blocks with which a dense step runs: the count that fits, less one until a step has been taken.

    Raises:
        NotMeasuredError: if not even one does.
    """
    if device.type != "cuda":
        return config.model.num_layers
    free, _ = torch.cuda.mem_get_info(device)
    dense = block.forms(config)[0]
    for layers in range(most_layers(config, free), 0, -1):
        try:
            trainer(with_layers(config, layers), dense, tokens, device, dtype).step()
            return layers
        except torch.OutOfMemoryError:
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    raise NotMeasuredError(
        f"not even one block of the model, with its embedding and head, trains in {free / 1e9:.0f} GB"
    )


def measure(
    name: str,
    config: Config,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    layers: int | None = None,
) -> dict[str, Any]:
    """Check the products of every sparse rival and time each for about `seconds`, with `layers` blocks or what fits.

    Raises:
        WrongResultError: a sparse rival is wrong; it and what comes after is not timed.
        NotMeasuredError: the model does not fit.
    """
    forget_graphs()
    torch.manual_seed(0)
    layers = layers or layers_that_fit(config, tokens, device, dtype)
    small = with_layers(config, layers)
    dense, *sparse = block.forms(small)
    flops = block.flops_of_model(small, block.batch_of(small, tokens)[1])
    numbers: dict[str, dict[str, Any]] = {}
    for rival, form in [(dense.name, dense), *((f.name, f) for f in sparse), (DENSE_AGAIN, dense)]:
        made = trainer(small, form, tokens, device, dtype)
        block.check(made.module, tokens, f"step of {name}, {rival}")
        timed = timing.in_turns({rival: made.step}, device, seconds)[rival].summary()
        numbers[rival] = _alone(timed) | {
            "tokens_per_second": tokens / timed["seconds"],
            "mfu": block.utilization(flops, tokens / timed["seconds"], device, dtype),
            "state_bytes": made.state_bytes(),
            "peak_bytes": made.peak_bytes(),
            "why_eager": made.why_eager,
            "adapter_rank": form.adapter_rank,
        }
        del made
        gc.collect()
    baseline, host = (
        (numbers[dense.name][what] + numbers[DENSE_AGAIN][what]) / 2 for what in ("seconds", "host_seconds")
    )
    for found in numbers.values():
        found["ratio"] = found["seconds"] / baseline
        found["host_excess"] = timing.host_excess(found, host, device)
    return block.describe(name, config, tokens, dtype) | {
        "layers": layers,
        "layers_of_model": config.model.num_layers,
        "recompute": config.training.recompute,
        "flops_per_token": flops,
        "rivals": numbers,
    }


def _alone(summary: dict[str, float]) -> dict[str, float]:
    """A summary without ratios to itself."""
    return {name: number for name, number in summary.items() if "ratio" not in name}
