"""A layer cut over tensor ranks is the whole layer: outputs, every gradient, initial values, masks; and its traffic.

Each rank, a real process, makes the whole layer and its own share of it from the same seed, runs both on the same
numbers in fp64 and compares: the output with its part of the whole one's, the gradient of the input and of every
parameter with its rectangle of the whole one's. Replicated parameters must therefore have the whole gradient on every
rank, with and without sequence parallelism. Collectives are counted as torch.distributed runs them.

Run: pytest tests/layers/test_tensor_parallel.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slope_dist.layers import LayerFactory, LogicalTensor, NextTokenLoss, logical_tensors
from slope_dist.models import ModelShape
from slope_dist.models.opt import OPTBlock
from slope_dist.parallel.regions import TensorPlace
from slope_dist.sparse import Pattern, SparseWeight
from tests.distributed import run_ranks
from tests.sparse.oracle import same_bits

B, S, H, F, V = 2, 8, 32, 96, 43
"""V is padded: to 48 rows on two ranks, 64 on four, of which the last has none in use."""

SHAPE = ModelShape(
    hidden_size=H, num_layers=2, num_heads=4, ffn_size=F, vocab_size=V, sequence_length=S, embedding_size=H
)


class Chain(nn.Module):
    """Layers one after another; `loss`, if there, takes the labels."""

    def __init__(self, *layers: nn.Module, loss: NextTokenLoss | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.loss is None else self.loss(x, labels)


def tied(make: LayerFactory, *, loss: bool) -> Chain:
    table = make.token_embedding("table", V, H, std=0.5)
    inside = (make.stream_entry(), make.layer_norm("norm", H), make.split_input())
    head = make.tied_head("table", V, H, std=0.5)
    return Chain(table, *inside, head, loss=make.next_token_loss() if loss else None)


@dataclass(frozen=True)
class Role:
    """How to make a layer, and how its input and output lie on tensor ranks.

    "stream": whole, or with sequence parallelism the rank's part of S; "features": cut along the last dimension;
    "ids": token numbers, whole; "logits": cut along the padded vocabulary; "scalar": one number.
    """

    make: Callable[[LayerFactory], Chain]
    given: str
    gives: str
    features: tuple[int, int] = (H, H)


def column(make: LayerFactory, bias: bool = True) -> Chain:
    return Chain(make.split_input(), make.linear("layer", H, F, split="column", std=0.5, bias=bias))


def row(make: LayerFactory, bias: bool = True) -> Chain:
    return Chain(make.linear("layer", F, H, split="row", std=0.5, bias=bias))


ROLES: dict[str, Role] = {
    "column": Role(column, "stream", "features", (H, F)),
    "column without bias": Role(lambda make: column(make, bias=False), "stream", "features", (H, F)),
    "row": Role(row, "features", "stream", (F, H)),
    "row without bias": Role(lambda make: row(make, bias=False), "features", "stream", (F, H)),
    "whole": Role(lambda make: Chain(make.linear("layer", H, F, split="whole", std=0.5)), "stream", "stream", (H, F)),
    "norm": Role(lambda make: Chain(make.layer_norm("layer", H)), "stream", "stream"),
    "tokens": Role(
        lambda make: Chain(make.token_embedding("table", V, H, std=0.5), make.stream_entry()), "ids", "stream"
    ),
    "positions": Role(lambda make: Chain(make.embedding("table", V, H, std=0.5), make.stream_entry()), "ids", "stream"),
    "tied head": Role(lambda make: tied(make, loss=False), "ids", "logits"),
    "loss": Role(lambda make: tied(make, loss=True), "ids", "scalar"),
    "block": Role(lambda make: Chain(OPTBlock(make, SHAPE, 1)), "stream", "stream"),
}

FORMS: dict[str, dict[str, Any]] = {
    "dense": {"pattern": None},
    "2:4": {"pattern": Pattern(2, 4)},
    "resident": {"pattern": Pattern(2, 4), "resident_transpose": True},
    "adapters": {"pattern": Pattern(2, 4), "adapter_rank": 16},
    "held mask": {"pattern": Pattern(2, 4), "hold_column_mask": True},
}


def place_of(sequence_parallel: bool) -> TensorPlace:
    from slope_dist.parallel.groups import start
    from slope_dist.parallel.layout import Layout

    ranks = torch.distributed.get_world_size()
    groups = start(Layout(tensor=ranks))
    return TensorPlace(groups.position.tensor, ranks, groups.tensor, sequence_parallel)


def named(module: nn.Module) -> dict[str, LogicalTensor]:
    return {tensor.name: tensor for tensor in logical_tensors(module)}


def rectangle_of(tensor: LogicalTensor, whole: Tensor) -> Tensor:
    return whole[tuple(slice(*bounds) for bounds in tensor.rectangle)]


def in_use(tensor: LogicalTensor, local: Tensor) -> Tensor:
    """A local tensor without the rows that pad the vocabulary."""
    return local[: tensor.rectangle[0][1] - tensor.rectangle[0][0]]


def part(kind: str, whole: Tensor, place: TensorPlace) -> Tensor:
    """What a rank sees of a tensor."""
    if kind == "stream" and place.sequence_parallel:
        return whole.chunk(place.ranks, dim=1)[place.rank]
    if kind == "features":
        return whole.chunk(place.ranks, dim=-1)[place.rank]
    if kind == "logits":
        padded = -(-V // (8 * place.ranks)) * 8 * place.ranks
        minus = torch.full((*whole.shape[:-1], padded - V), -torch.inf, dtype=whole.dtype)
        return torch.cat([whole, minus], dim=-1).chunk(place.ranks, dim=-1)[place.rank]
    return whole


def far(found: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest entry; infinite entries must be the same."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    if not finite.any():
        return 0.0
    scale = max(float(expected[finite].abs().max()), 1e-30)
    return float((found[finite] - expected[finite]).abs().max()) / scale


def differences(role: Role, form: dict[str, Any], place: TensorPlace) -> dict[str, float]:
    """The rank's share of a layer against the whole layer."""
    whole, share = role.make(LayerFactory(seed=1, **form)), role.make(LayerFactory(seed=1, **form, place=place))
    draw = torch.Generator().manual_seed(5)
    of_whole, of_share = named(whole), named(share)
    assert of_whole.keys() == of_share.keys()
    with torch.no_grad():
        # Biases, norms and second factors begin at values that would hide mistakes.
        for name, tensor in of_whole.items():
            if tensor.trained and name.endswith(("bias", "up", "norm.weight", "layer.weight")):
                tensor.tensor.copy_(torch.randn(tensor.shape, generator=draw))
                in_use(of_share[name], of_share[name].tensor).copy_(rectangle_of(of_share[name], tensor.tensor))
    whole, share = whole.double(), share.double()
    of_whole, of_share = named(whole), named(share)
    if role.given == "ids":
        ids = torch.randint(V, (B, S), generator=draw)
        labels = torch.randint(V, (B, S), generator=draw)
        labels[0, 3:] = NextTokenLoss.IGNORED_LABEL
        more = (labels,) if role.gives == "scalar" else ()
        y, y_share = whole(ids, *more), share(ids, *more)
        inputs: list[Tensor] = []
    else:
        x = torch.randn(B, S, role.features[0], dtype=torch.float64, generator=draw)
        inputs = [x.clone().requires_grad_(), part(role.given, x, place).clone().requires_grad_()]
        y, y_share = whole(inputs[0]), share(inputs[1])
    found = {"output": far(y_share.detach(), part(role.gives, y.detach(), place))}
    grad_y = torch.randn(y.shape, dtype=y.dtype, generator=draw)
    padded = torch.where(y_share.isfinite(), 1.0, 0.0)
    grad_share = part(role.gives, grad_y, place).to(y_share.dtype)
    y.backward(grad_y)
    y_share.backward(torch.where(padded > 0, grad_share, 0.0))
    if inputs:
        grads = [tensor.grad for tensor in inputs]
        assert grads[0] is not None and grads[1] is not None
        found["input"] = far(grads[1], part(role.given, grads[0], place))
    for name, tensor in of_share.items():
        if tensor.trained:
            mine, other = tensor.tensor.grad, of_whole[name].tensor.grad
            assert mine is not None and other is not None, name
            found[name] = far(in_use(tensor, mine), rectangle_of(tensor, other))
            if name.endswith("k_proj.bias"):
                # Softmax hides it: its gradient is rounding alone.
                assert max(float(grad.abs().max()) for grad in (mine, other)) < 1e-12
                found[name] = 0.0
            assert not mine[len(in_use(tensor, mine)) :].any(), "rows that pad the vocabulary have no gradient"
    return found


def all_differences() -> dict[str, dict[str, float]]:
    found = {}
    for sequence_parallel in (False, True):
        place = place_of(sequence_parallel)
        for role_name, role in ROLES.items():
            linear = role_name.split()[0] in ("column", "row", "whole", "block")
            for form_name, form in FORMS.items() if linear else [("dense", FORMS["dense"])]:
                label = f"{role_name}, {form_name}, {'sequence parallel' if sequence_parallel else 'tensor only'}"
                found[label] = differences(role, form, place)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_all_gradients_are_those_of_the_whole_layer(ranks: int) -> None:
    results = run_ranks(all_differences, ranks)
    assert len(results[0]) == 2 * (6 * len(FORMS) + len(ROLES) - 6)
    for label in results[0]:
        # The loss is computed in fp32.
        bound = 1e-6 if label.startswith("loss") else 1e-12
        worst: dict[str, float] = {}
        for rank in results:
            for name, size in rank[label].items():
                worst[name] = max(size, worst.get(name, 0.0))
        assert {name: size for name, size in worst.items() if not size <= bound} == {}, label
        assert len(worst) > 1, "gradients were compared"


def slices_of_the_whole() -> list[str]:
    """Tensors of this rank, as the factory makes them, that are not the slice of the whole to the bit."""
    wrong = []
    place = place_of(False)
    for form_name, form in FORMS.items():
        for role_name, role in ROLES.items():
            whole, share = role.make(LayerFactory(seed=1, **form)), role.make(LayerFactory(seed=1, **form, place=place))
            other = named(whole)
            for name, tensor in named(share).items():
                label = f"{form_name}/{role_name}/{name}"
                local = tensor.tensor.detach()
                if name.endswith((".indices", ".column_mask", ".values")):
                    # Compressed rows are cut where the dense ones are.
                    assert tensor.split == (role_name != "whole")
                if not same_bits(in_use(tensor, local), rectangle_of(tensor, other[name].tensor.detach())):
                    wrong.append(label)
                if local[len(in_use(tensor, local)) :].any():
                    wrong.append(f"{label}: padding")
            for mine, all_of_it in zip(weights_of(share), weights_of(whole), strict=True):
                if not same_bits(mine.matrix().doubly_pruned(), cut_like(mine, all_of_it)):
                    wrong.append(f"{form_name}/{role_name}: double pruning")
    return wrong


def weights_of(module: nn.Module) -> list[SparseWeight]:
    return [child for child in module.modules() if isinstance(child, SparseWeight)]


def cut_like(mine: SparseWeight, whole: SparseWeight) -> Tensor:
    """The part of the whole's W^{R,C} that a share of its shape on this rank stands for."""
    dense = whole.matrix().doubly_pruned()
    for dim in (0, 1):
        if mine.shape[dim] != whole.shape[dim]:
            dense = dense.chunk(torch.distributed.get_world_size(), dim=dim)[torch.distributed.get_rank()]
    return dense


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_share_begins_as_the_slice_of_the_whole_to_the_bit(ranks: int) -> None:
    assert run_ranks(slices_of_the_whole, ranks) == [[]] * ranks


COLLECTIVES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


class CollectiveCount(TorchDispatchMode):
    """Counts the collectives that torch.distributed runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            self.counts[COLLECTIVES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


def traffic_of_a_block() -> dict[str, list[dict[str, int]]]:
    """Collectives of a block, forward and backward, by kind of run."""
    found = {}
    for sequence_parallel in (False, True):
        place = place_of(sequence_parallel)
        for form_name, form in FORMS.items():
            block = OPTBlock(LayerFactory(seed=1, **form, place=place), SHAPE, 1)
            x = part("stream", torch.randn(B, S, H), place).clone().requires_grad_()
            counts = []
            with CollectiveCount() as forward:
                y = block(x)
            counts.append(dict(forward.counts))
            with CollectiveCount() as backward:
                y.sum().backward()
            counts.append(dict(backward.counts))
            found[f"{form_name}{', sequence parallel' if sequence_parallel else ''}"] = counts
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_sparsity_adds_no_collective_and_adapters_one_a_replicated_factor(ranks: int) -> None:
    pairs = {"all-gather": 2, "reduce-scatter": 2}
    # Two norms of two tensors, two biases of row-split layers: each its own small sum.
    sums_of_the_stream = 2 * 2 + 2
    # One of the two factors beside each of six linears is whole on every rank.
    factors = 6
    for rank in run_ranks(traffic_of_a_block, ranks):
        assert len(rank) == 2 * len(FORMS)
        for form in FORMS:
            adapters = factors if form == "adapters" else 0
            assert rank[form] == [{"all-reduce": 2}, {"all-reduce": 2 + adapters}], form
            assert rank[f"{form}, sequence parallel"] == [
                pairs,
                pairs | {"all-reduce": sums_of_the_stream + adapters},
            ], form
