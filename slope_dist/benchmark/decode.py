"""Inference of a loaded model, dense beside 2:4: reading prompts and writing token after token.

Where a GPU is used, a step of writing is a CUDA graph for both: of small products the host's calls would be measured
otherwise. If one of the two cannot be captured neither is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slope_dist.benchmark import memory, timing
from slope_dist.benchmark.checking import check_linear
from slope_dist.benchmark.random_models import (
    Form,
    build_language_model,
    factory,
    sparse_weights,
    tensor_bytes,
    with_layers,
)
from slope_dist.config import Config
from slope_dist.inference.products import attend_at_any_length
from slope_dist.layers import Linear
from slope_dist.models import Decoding, LanguageModel
from slope_dist.planning import measure as measure_share
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import SparseWeight
from slope_dist.training.build import build

DENSE, SPARSE = "dense", "2:4"
RANKS = (0.0, 0.0156, 0.0625)
"""Of the adapters, as shares of the width (arXiv 2405.16325, table 2)."""

MEMORY_SHARE = 0.75
"""Of a GPU, for both models, their keys and values; the rest is for activations."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the models do.

    Attributes:
        prompt: tokens of a prompt; writing goes on behind one.
        prefill: tokens of all prompts that are read at once.
        batches: sequences that are written at once.
    """

    prompt: int = 1024
    prefill: int = 8192
    batches: Sequence[int] = (1, 4, 16)


def adapter_rank(config: Config, share: float) -> int:
    """R for a share of the width; 0 for none."""
    if not share:
        return 0
    return config.adapters.model_copy(update={"rank": share}).adapter_rank(config.model.hidden_size)


def layers_that_fit(config: Config, work: Work, device: torch.device, dtype: torch.dtype) -> int:
    """The most blocks with which both models fit, and their keys and values, by counting; all of them on the CPU."""
    if device.type != "cuda":
        return config.model.num_layers
    free, _ = torch.cuda.mem_get_info(device)

    def both(layers: int) -> int:
        small = with_layers(config, layers)
        share = measure_share(build(small, factory(small, Form(DENSE, sparse=False), "meta")))
        # A 2:4 element is 10 bits of 16, our metadata and the library's included; a square layer's adapter of rank R
        # adds 2 R to each of its columns.
        weights = share.elements * dtype.itemsize * (1 + 10 / 16 + 2 * RANKS[-1])
        shape = shape_of(small.model)
        kept = 2 * shape.kv_heads * shape.head_size * layers * max(work.batches) * (work.prompt + 1)
        return int(weights + 2 * kept * dtype.itemsize)

    first, each = both(1), both(2) - both(1)
    return max(1, min(config.model.num_layers, 1 + int((free * MEMORY_SHARE - first) // each)))


def measure(
    name: str,
    config: Config,
    share: float,
    work: Work,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    layers: int | None = None,
) -> dict[str, Any]:
    """Check the 2:4 layers, then time both models in turns, for about `seconds` each way of use.

    Args:
        name: of the config.
        config: of a run; its model counts.
        share: rank of the adapters as a share of the width.
        work: what is timed.
        device: where.
        dtype: of all numbers.
        seconds: of each timing.
        layers: blocks of the model; None: as many as fit.

    Raises:
        WrongResultError: a 2:4 layer is wrong; nothing is timed.
    """
    torch.manual_seed(0)
    # As a loaded model does.
    attend_at_any_length()
    small = with_layers(config, layers or layers_that_fit(config, work, device, dtype))
    rank = adapter_rank(config, share)
    prompts = max(1, work.prefill // work.prompt)
    models, held = {}, {}
    memory.make_workspaces(device)
    for form in (Form(DENSE, sparse=False), Form(SPARSE, sparse=True, adapter_rank=rank)):
        before = memory.allocated(device)
        models[form.name] = model = build_language_model(small, form, device, dtype).eval()
        what = f"{name}, rank {rank}"
        # The most tokens first: what is chosen for them decides what a weight is laid out for.
        _check(model, [prompts * work.prompt], what)
        for weight in sparse_weights(model):
            weight.prepare_kernels()
        _check(model, [prompts * work.prompt, *work.batches], what)
        after = memory.allocated(device)
        held[form.name] = tensor_bytes(model) if after is None or before is None else after - before
    with torch.inference_mode():
        vocabulary = config.model.vocab_size
        uses = {"prefill": _prefill(models, prompts, work.prompt, vocabulary, device, seconds)}
        for batch in work.batches:
            uses[f"decode {batch}"] = _decode(models, batch, work.prompt, device, seconds)
    return {
        "config": name,
        "hidden_size": config.model.hidden_size,
        "layers": small.model.num_layers,
        "layers_of_model": config.model.num_layers,
        "rank_share": share,
        "adapter_rank": rank,
        "prompt": work.prompt,
        "prompts": prompts,
        "dtype": str(dtype).removeprefix("torch."),
        "resident_bytes": held,
        "memory_ratio": held[SPARSE] / held[DENSE],
        "uses": uses,
    }


def _check(model: LanguageModel, counts: Sequence[int], what: str) -> None:
    """Check the first 2:4 layer of every shape with some numbers of tokens."""
    layers: dict[tuple[int, int], Linear] = {}
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.weight, SparseWeight):
            layers.setdefault(module.weight.shape, module)
    for (rows, columns), layer in layers.items():
        for tokens in counts:
            check_linear(layer, tokens, f"{what}, {rows} x {columns}, {tokens} tokens")


def _prefill(
    models: dict[str, LanguageModel], prompts: int, length: int, vocabulary: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    tokens = torch.randint(vocabulary, (prompts, length), device=device)

    def reading(model: LanguageModel) -> Callable[[], Tensor]:
        return lambda: model.logits(tokens, since=length - 1)

    timed = timing.in_turns({name: reading(model) for name, model in models.items()}, device, seconds)
    return {
        name: taken.summary() | {"tokens_per_second": tokens.numel() / taken.summary()["seconds"]}
        for name, taken in timed.items()
    }


def _decode(
    models: dict[str, LanguageModel], batch: int, length: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    steps = {name: _writing(model, batch, length, device) for name, model in models.items()}
    why_no_graph: str | None = "on the CPU"
    if device.type == "cuda":
        try:
            steps, why_no_graph = {name: _captured(step) for name, step in steps.items()}, None
        except RuntimeError as error:
            why_no_graph = str(error).strip().splitlines()[0][:200]
    timed = timing.in_turns(steps, device, seconds)
    numbers: dict[str, Any] = {}
    for name, taken in timed.items():
        summary = taken.summary()
        numbers[name] = summary | {"tokens_per_second": batch / summary["seconds"], "why_no_graph": why_no_graph}
    return numbers


def _writing(model: LanguageModel, batch: int, length: int, device: torch.device) -> Callable[[], object]:
    """One token more for each sequence, always the one behind the prompt."""
    decoding = Decoding(torch.zeros(batch, dtype=torch.int64, device=device), length + 1)
    last = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def step() -> Tensor:
        decoding.seen = length
        return model.logits(last, decoding)

    step()
    # In place of a prompt's, which to read would be another search of kernels.
    for kept in decoding.tensors:
        kept.normal_()
    return step


def _captured(step: Callable[[], object]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
