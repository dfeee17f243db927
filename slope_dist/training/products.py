"""Which kernels a run computes its 2:4 products with: measured by one rank, the same on all.

That is what a training step asks for. For other numbers of tokens, as of an evaluation's last batch, weights are
expanded: ranks that measured them on their own could choose differently, beside a model that leaves little memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from slope_dist.config import Config, Derived
from slope_dist.parallel import collectives
from slope_dist.sparse import SparseWeight, kernels
from slope_dist.sparse.kernels.problem import Kind
from slope_dist.training.build import build_share, stages

FILE = "kernels.json"
"""In the run folder, so that a resumed run computes every product as before."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def start_products(config: Config, derived: Derived, folder: Path) -> list[str]:
    """Choose, and use from now on, how 2:4 products are computed on this rank's GPU, if it has one. Collective.

    Returns:
        what was chosen and why, in lines.
    """
    kernels.activate(None)
    if not torch.cuda.is_available() or "2:4" not in config.sparsity.patterns:
        return []
    if config.sparsity.kernels == "reference":
        return ["2:4 products: by the reference, as sparsity.kernels says"]
    device = torch.device("cuda", torch.cuda.current_device())
    dispatcher = make_dispatcher(config, folder, device)
    share_choices(dispatcher, product_uses(config, derived, device))
    # What measuring took is no part of the run: of its peak, or of what the allocator holds on to on this rank alone.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    kernels.activate(dispatcher)
    return dispatcher.report()


def make_dispatcher(config: Config, folder: Path, device: torch.device) -> kernels.Dispatcher:
    """A dispatcher as the run's engine needs it; the first rank's reads and writes the run folder's file."""
    first = collectives.rank() == 0
    with collectives.together():
        # The run folder is this run's alone, so what an earlier one left is nobody's, on whatever machine it was.
        store = kernels.ChoiceStore(folder / FILE, alone=True) if first else None
    return kernels.Dispatcher(
        device,
        kernels.find_vendors(device, config.sparsity.vendors),
        store,
        # Engines move parameters into buffers of their own, so no weight lies where a library would have it.
        arrangement="derived" if config.parallel.shards_parameters else "kept",
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def product_uses(config: Config, derived: Derived, device: torch.device) -> list[tuple[Kind, kernels.Problem]]:
    """Every 2:4 product of a step, on whatever rank: tensor ranks hold equal shapes, pipeline stages may not."""
    tokens = config.training.micro_batch_size * config.model.sequence_length
    uses: dict[tuple[Kind, kernels.Problem], None] = {}
    for stage in range(len(stages(config, derived)) - 1):
        for weight in build_share(config, derived, adapters=False, stage=stage).modules():
            if not (isinstance(weight, SparseWeight) and weight.pattern.is_two_four):
                continue
            problem = kernels.Problem(tokens, *weight.shape, _DTYPES[config.precision], device)
            # What the input gradient is made of is measured before it.
            uses["product", problem] = uses["product", problem.transposed()] = None
            if derived.backward_weight == "derived":
                uses["input gradient", problem] = None
    return list(uses)


def share_choices(dispatcher: kernels.Dispatcher, uses: list[tuple[Kind, kernels.Problem]]) -> None:
    """Let the first rank measure and all others, on like cards, take over what it found. Collective."""

    def measure(alive: Callable[[], None]) -> None:
        for use in uses:
            dispatcher.warm_up([use])
            alive()

    collectives.alone(measure)
    made = collectives.broadcast_json([dispatcher.setting, dispatcher.as_data(), dispatcher.findings()])
    setting, choices, findings = made
    if setting == dispatcher.setting:
        dispatcher.adopt(choices, findings)
    dispatcher.warm_up(uses)
    dispatcher.settle()
