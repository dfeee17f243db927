"""How a loaded model computes its 2:4 products and its attention on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from slope_dist.sparse import SparseWeight, kernels
from slope_dist.sparse.kernels.problem import Kind

WARM_TOKENS = (1, 16, 2048)
"""Tokens for which products are measured before the first is asked for: one sequence, a batch of them, a prompt."""


def choices_file() -> Path:
    """Where choices are kept between processes: `SLOPE_DIST_KERNELS`, or a file in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SLOPE_DIST_KERNELS") or cache / "slope_dist" / "kernels.json")


def start_products(module: nn.Module, device: torch.device, dtype: torch.dtype) -> kernels.Dispatcher | None:
    """Choose and use kernels for a model's 2:4 weights, and lay those where they are read; None: not on a GPU.

    Raises:
        UserError: if the file of choices is something else, or cannot be written.
    """
    if device.type != "cuda":
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    store = kernels.ChoiceStore(choices_file(), hint="SLOPE_DIST_KERNELS names another file")
    deterministic = torch.are_deterministic_algorithms_enabled()
    dispatcher = kernels.Dispatcher(
        device,
        kernels.find_vendors(device, ["cusparselt"]),
        store,
        arrangement="in place",
        deterministic=deterministic,
    )
    prepare(module, dispatcher, dtype)
    return dispatcher


def prepare(module: nn.Module, dispatcher: kernels.Dispatcher, dtype: torch.dtype) -> None:
    """Measure what a model's weights will be asked for, use the dispatcher from now on, and lay the weights."""
    weights = [m for m in module.modules() if isinstance(m, SparseWeight) and m.pattern.is_two_four]
    uses: dict[tuple[Kind, kernels.Problem], None] = {}
    for shape in {weight.shape for weight in weights}:
        for tokens in WARM_TOKENS:
            uses["product", kernels.Problem(tokens, *shape, dtype, dispatcher.device)] = None
    dispatcher.warm_up(uses)
    kernels.activate(dispatcher)
    for weight in weights:
        weight.prepare_kernels()


def attend_at_any_length() -> None:
    """Let torch choose among the kinds of attention that need no plan of each length: for sequences that grow.

    On Hopper it prefers cuDNN's, which is made ready for each shape anew, on the host, before it runs.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
