"""The factory alone decides what is sparse, says so in one line, and adds adapters without touching anything else.

Run: pytest tests/layers/test_factory.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from slope_dist.layers import LayerFactory, Linear, LowRankAdapter, initialization, logical_tensors
from slope_dist.sparse import CompressedMatrix, DenseWeight, Pattern, SparseWeight
from tests.sparse.oracle import same_bits

TWO_FOUR = Pattern(2, 4)


def linear(make: LayerFactory, name: str = "block.fc1", *, bias: bool = True) -> Linear:
    return make.linear(name, 40, 24, split="column", std=0.02, bias=bias)


def sparse_weight(layer: Linear) -> SparseWeight:
    assert isinstance(layer.weight, SparseWeight)
    return layer.weight


def adapter_of(layer: Linear) -> LowRankAdapter:
    assert layer.adapter is not None
    return layer.adapter


def test_a_linear_is_sparse_unless_listed() -> None:
    make = LayerFactory(seed=1, pattern=TWO_FOUR, dense_layers={"block.fc1": "listed", "head.*": "part of the head"})
    kinds = {name: type(linear(make, name).weight) for name in ("block.fc1", "block.fc10", "block.fc2", "head.out")}
    assert kinds == {
        "block.fc1": DenseWeight,
        "block.fc10": SparseWeight,
        "block.fc2": SparseWeight,
        "head.out": DenseWeight,
    }
    assert list(make.sparse) == ["block.fc10", "block.fc2"]
    assert make.dense == {"block.fc1": "listed", "head.out": "part of the head"}


def test_glob_patterns_are_case_sensitive() -> None:
    make = LayerFactory(seed=1, pattern=TWO_FOUR, dense_layers={"Block.*": "listed"})
    assert isinstance(linear(make).weight, SparseWeight)


def test_initial_values_are_the_named_draw_pruned() -> None:
    make = LayerFactory(seed=7, pattern=TWO_FOUR, dense_layers={"dense": "listed"})
    layer, dense = linear(make), linear(make, "dense")
    draw = initialization.normal(7, "block.fc1.weight", (24, 40), 0.02)
    expected = CompressedMatrix.prune(draw, TWO_FOUR)
    assert same_bits(layer.weight.values.detach(), expected.values)
    assert same_bits(sparse_weight(layer).indices, expected.indices)
    assert same_bits(dense.weight.values.detach(), initialization.normal(7, "dense.weight", (24, 40), 0.02))
    assert layer.bias is not None and layer.bias.shape == (24,) and not layer.bias.any()
    assert linear(make, bias=False).bias is None
    table = make.embedding("table", 30, 16, std=0.5)
    assert same_bits(table.weight.detach(), initialization.normal(7, "table.weight", (30, 16), 0.5))


def test_the_order_of_asking_changes_nothing() -> None:
    first, second = LayerFactory(seed=1, pattern=TWO_FOUR), LayerFactory(seed=1, pattern=TWO_FOUR)
    names = ["a", "b", "c"]
    forward = {name: linear(first, name) for name in names}
    backward = {name: linear(second, name) for name in reversed(names)}
    for name in names:
        assert same_bits(forward[name].weight.values.detach(), backward[name].weight.values.detach())
        assert same_bits(sparse_weight(forward[name]).indices, sparse_weight(backward[name]).indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_comes_from_the_fp32_draw_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    expected = sparse_weight(linear(LayerFactory(seed=1, pattern=TWO_FOUR))).indices
    torch.set_default_dtype(dtype)
    assert sparse_weight(linear(LayerFactory(seed=1, pattern=TWO_FOUR))).indices.equal(expected)


def test_options_reach_the_weight() -> None:
    held = linear(LayerFactory(seed=1, pattern=TWO_FOUR, hold_column_mask=True)).weight
    assert "column_mask" in dict(held.named_buffers())
    sharded = linear(LayerFactory(seed=1, pattern=TWO_FOUR, shard_metadata=True)).weight
    assert "indices" in dict(sharded.named_parameters())
    assert linear(LayerFactory(seed=1, pattern=TWO_FOUR, resident_transpose=True)).weight.resident_transpose
    assert linear(LayerFactory(seed=1, pattern=Pattern(4, 8))).weight.pattern == Pattern(4, 8)


def test_adapters_join_the_sparse_linears_only() -> None:
    make = LayerFactory(seed=1, pattern=TWO_FOUR, dense_layers={"dense": "listed"}, adapter_rank=16)
    sparse, dense = linear(make), linear(make, "dense")
    assert dense.adapter is None
    adapter = adapter_of(sparse)
    assert adapter.down.shape == (16, 40) and adapter.up.shape == (24, 16)
    assert adapter.scale == 1 / 16
    assert not adapter.up.any()
    assert same_bits(adapter.down.detach(), initialization.normal(1, "block.fc1.adapter.down", (16, 40), 1.0))


def test_the_first_factor_has_unit_standard_deviation() -> None:
    make = LayerFactory(seed=1, pattern=TWO_FOUR, adapter_rank=64)
    down = adapter_of(make.linear("wide", 1024, 64, split="row", std=0.02)).down
    assert float(down.detach().std()) == pytest.approx(1, abs=0.02)


def test_a_dense_run_has_no_adapters() -> None:
    assert linear(LayerFactory(seed=1, pattern=None, adapter_rank=16)).adapter is None


def test_adapters_change_neither_the_other_tensors_nor_the_output() -> None:
    before, after = (linear(LayerFactory(seed=1, pattern=TWO_FOUR, adapter_rank=rank)) for rank in (0, 16))
    state = after.state_dict()
    assert set(state) - set(before.state_dict()) == {"adapter.down", "adapter.up"}
    for name, tensor in before.state_dict().items():
        assert same_bits(tensor, state[name])
    x = torch.randn(9, 40)
    assert after(x).equal(before(x))


def test_without_drawing_only_adapters_have_values() -> None:
    make = LayerFactory(seed=1, pattern=TWO_FOUR, dense_layers={"dense": "listed"}, adapter_rank=16, draw=False)
    drawn = LayerFactory(seed=1, pattern=TWO_FOUR, dense_layers={"dense": "listed"}, adapter_rank=16)
    layer = linear(make)
    assert not layer.weight.values.any() and not linear(make, "dense").weight.values.any()
    assert not make.embedding("table", 30, 16, std=0.5).weight.any()
    assert same_bits(adapter_of(layer).down.detach(), adapter_of(linear(drawn)).down.detach())
    assert {n: t.shape for n, t in layer.state_dict().items()} == {
        n: t.shape for n, t in linear(drawn).state_dict().items()
    }


@pytest.mark.parametrize("option", ["hold_column_mask", "shard_metadata", "resident_transpose", "draw"])
def test_on_the_meta_device_there_are_the_same_tensors_without_memory(option: str) -> None:
    def build(device: str) -> nn.Module:
        make = LayerFactory(
            seed=1, pattern=TWO_FOUR, dense_layers={"dense": "listed"}, adapter_rank=16, device=device, **{option: True}
        )
        return nn.ModuleList(
            [
                linear(make),
                linear(make, "dense"),
                linear(make, "no bias", bias=False),
                make.embedding("table", 30, 16, std=0.02),
                make.layer_norm("norm", 40),
            ]
        )

    real, meta = list(logical_tensors(build("cpu"))), list(logical_tensors(build("meta")))
    assert {tensor.tensor.device.type for tensor in meta} == {"meta"}
    for ours, other in zip(real, meta, strict=True):
        assert dataclasses.replace(ours, tensor=other.tensor) == other
        assert ours.tensor.dtype == other.tensor.dtype
        assert ours.tensor.requires_grad == other.tensor.requires_grad


def test_summary_counts_and_gives_reasons() -> None:
    make = LayerFactory(seed=1, pattern=TWO_FOUR, dense_layers={"block.0.[qkv]": "after the input", "out": "head"})
    for name in ("block.0.q", "block.0.k", "block.0.v", "block.0.o", "block.1.q", "out"):
        linear(make, name)
    assert make.summary() == (
        "sparse 2/6 linears; dense: block.0.q, block.0.k, block.0.v (after the input), out (head)"
    )


def test_summary_of_a_dense_run_and_of_a_wholly_sparse_one() -> None:
    dense, sparse = LayerFactory(seed=1, pattern=None), LayerFactory(seed=1, pattern=TWO_FOUR)
    for make in (dense, sparse):
        linear(make, "a")
        linear(make, "b")
    assert dense.summary() == "sparse 0/2 linears; dense: all (the run is dense)"
    assert sparse.summary() == "sparse 2/2 linears"


def test_summary_shortens_a_long_list() -> None:
    make = LayerFactory(seed=1, pattern=TWO_FOUR, dense_layers={"*": "listed"})
    for index in range(9):
        linear(make, f"layer{index}")
    assert make.summary().endswith("layer5 and 3 more (listed)")
