"""Two tensor ranks that share one GPU train a pair of split layers as one rank trains the whole ones.

The layers are those of a feed-forward block, 2:4 with adapters and biases, in fp32 and in bf16 by whatever the
dispatcher of each rank finds; the ranks meet through gloo, since nccl wants a GPU for each. Loss, output, the gradient
of the input and of every parameter, and every parameter after AdamW's update are held against the whole layers.
Without a GPU the ranks share the CPU, with a vendor of plain torch. `environment.start`, which refuses more ranks than
GPUs, takes no part: this says nothing of nccl.

Run: pytest tests/layers/test_two_ranks_on_one_card.py -rs
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slope_dist.layers import LayerFactory, logical_tensors
from slope_dist.parallel.regions import TensorPlace
from slope_dist.sparse import Pattern, kernels
from tests import distributed
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.kernels.vendors import PlainVendor, preferring, vendors

RANKS, BATCH, SEQUENCE, HIDDEN, FEATURES = 2, 2, 32, 128, 512
STEPS = 3
BOUNDS = {"float32": 1e-4, "bfloat16": 6e-2}
"""Relative norm after three steps. Of bf16 six times what one product may be off: four of them in a row make
the input's gradient, partial sums are rounded once more on each rank, and three updates act on it. Whatever is left out
or summed twice is off by a third or more."""


def layers(place: TensorPlace, device: torch.device, dtype: torch.dtype) -> nn.ModuleList:
    make = LayerFactory(seed=5, pattern=Pattern(2, 4), adapter_rank=16, place=place)
    up = make.linear("up", HIDDEN, FEATURES, split="column", std=0.1, bias=True)
    made = nn.ModuleList(
        [make.split_input(), up, make.linear("down", FEATURES, HIDDEN, split="row", std=0.1, bias=True)]
    )
    for tensor in logical_tensors(made):
        if tensor.trained and not float(tensor.tensor.detach().abs().sum()):
            # What starts as zeros, second factors and biases, would leave their partners without gradients.
            whole = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor.name)))
            tensor.tensor.data.copy_(whole[tuple(slice(*bounds) for bounds in tensor.rectangle)] * 0.1)
    return made.to(device, dtype)


def trained(made: nn.ModuleList, place: TensorPlace, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A few steps: outputs, losses and gradients of each, and the parameters that they lead to."""
    generator = torch.Generator().manual_seed(9)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, eps=1e-2)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=generator).to(device, dtype).requires_grad_()
        wanted = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=generator).to(device, dtype)
        y = x
        for layer in made:
            y = layer(y)
        loss = (y.float() - wanted.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        found |= {f"{step} loss": loss, f"{step} y": y, f"{step} x": x.grad}
        found |= {f"{step} gradient {t.name}": t.tensor.grad for t in logical_tensors(made) if t.trained}
        optimizer.step()
        for module in made.modules():
            if hasattr(module, "values_changed"):
                module.values_changed()
    found |= {f"updated {t.name}": t.tensor for t in logical_tensors(made) if t.trained}
    return {name: value.detach().float().clone() for name, value in found.items()}


def two_ranks(kind: str, name: str) -> dict[str, Any]:
    """On one rank: how far its share is from its part of the whole, by name."""
    os.environ.pop("TRITON_INTERPRET", None)
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=RANKS)
    device, dtype = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu"), getattr(torch, name)
    if kind == "cuda":
        torch.cuda.set_device(device)
        found, timer = kernels.find_vendors(device), preferring("/1 ", "transpose")
    else:
        found, timer = vendors(PlainVendor()), preferring("plain/1", "transpose")
    dispatcher = kernels.Dispatcher(device, found, timer=timer)
    place = TensorPlace(dist.get_rank(), RANKS, dist.group.WORLD)
    with kernels.using(dispatcher):
        share = layers(place, device, dtype)
        parts = trained(share, place, device, dtype)
    alone = TensorPlace()
    # The whole by plain torch, in fp64 of the same rounded numbers.
    whole_layers = layers(alone, torch.device("cpu"), dtype).double()
    whole = trained(whole_layers, alone, torch.device("cpu"), torch.float64)
    rectangles = {t.name: t.rectangle for t in logical_tensors(share)}
    off = {}
    for key, part in parts.items():
        expected = whole[key]
        tensor = key.split()[-1]
        if tensor in rectangles:
            expected = expected[tuple(slice(*bounds) for bounds in rectangles[tensor])]
        off[key] = float((part.cpu() - expected).norm() / expected.norm())
    labels = sorted({entry["label"] for entry in dispatcher.as_data().values()})
    dist.destroy_process_group()
    return {"off": off, "labels": labels, "names": sorted(rectangles)}


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_are_one(device: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # They are to share it.
    monkeypatch.setattr(distributed, "skip_without_gpus", lambda world_size: None)
    outcomes = distributed.end_ranks(two_ranks, RANKS, device, dtype, process_group=False)
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank}: {outcome.errors[-4000:]}"
        far = {name: off for name, off in outcome.result["off"].items() if not off <= BOUNDS[dtype]}
        assert not far, f"rank {rank}, by {outcome.result['labels']}: {far}"
        assert len(outcome.result["off"]) > STEPS * (3 + 8)
