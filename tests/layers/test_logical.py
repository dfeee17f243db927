"""Every tensor of a model's state is listed once, under its global name, with the right flags.

Over tensor ranks the pieces that are owned cover each logical tensor exactly once; what is not split is owned by one.

Run: pytest tests/layers/test_logical.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slope_dist.layers import Head, LayerFactory, LogicalTensor, logical_tensors
from slope_dist.parallel.fragments import rectangle_size
from slope_dist.parallel.regions import TensorPlace
from slope_dist.sparse import Pattern


def model(**options: Any) -> nn.ModuleDict:
    make = LayerFactory(seed=1, pattern=Pattern(2, 4), dense_layers={"first": "listed"}, **options)
    table = make.token_embedding("table", 30, 32, std=0.02)
    return nn.ModuleDict(
        {
            "head_comes_early": make.tied_head("table", 30, 32, std=0.02),
            "table": table,
            "inner": nn.ModuleList(
                [
                    make.linear("first", 32, 32, split="column", std=0.02),
                    make.linear("second", 32, 64, split="column", std=0.02),
                    make.linear("third", 64, 32, split="row", std=0.02, bias=False),
                ]
            ),
            "norm": make.layer_norm("norm", 32),
        }
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapters": {"adapter_rank": 16},
    "held": {"hold_column_mask": True},
    "sharded metadata": {"hold_column_mask": True, "shard_metadata": True, "adapter_rank": 16},
    "resident": {"resident_transpose": True},
}


def listed(whole: nn.Module) -> dict[str, LogicalTensor]:
    tensors = list(logical_tensors(whole))
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names)
    return dict(zip(names, tensors, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_and_buffer_is_listed_exactly_once(name: str) -> None:
    whole = model(**OPTIONS[name])
    ids = [id(tensor.tensor) for tensor in listed(whole).values()]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(tensor) for tensor in [*whole.parameters(), *whole.buffers()]}


def test_names_and_shapes_are_global() -> None:
    tensors = listed(model(adapter_rank=16, hold_column_mask=True))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "table.weight": (30, 32),
        "first.bias": (32,),
        "first.weight.values": (32, 32),
        "second.bias": (64,),
        "second.weight.values": (64, 16),
        "second.weight.indices": (64, 4),
        "second.weight.column_mask": (64, 4),
        "second.adapter.down": (16, 32),
        "second.adapter.up": (64, 16),
        "third.weight.values": (32, 32),
        "third.weight.indices": (32, 8),
        "third.weight.column_mask": (32, 8),
        "third.adapter.down": (16, 64),
        "third.adapter.up": (32, 16),
        "norm.weight": (32,),
        "norm.bias": (32,),
    }


@pytest.mark.parametrize("shard_metadata", [False, True], ids=["buffers", "parameters"])
def test_flags(shard_metadata: bool) -> None:
    tensors = listed(model(adapter_rank=16, hold_column_mask=True, shard_metadata=shard_metadata))
    metadata = {name for name, tensor in tensors.items() if not tensor.trained}
    assert metadata == {name for name in tensors if name.endswith((".indices", ".column_mask"))}
    assert {name for name, tensor in tensors.items() if tensor.adapter} == {
        name for name in tensors if ".adapter." in name
    }
    not_decayed = {name for name, tensor in tensors.items() if tensor.trained and not tensor.decay}
    assert not_decayed == {"first.bias", "second.bias", "norm.weight", "norm.bias"}
    for tensor in tensors.values():
        assert tensor.trained == tensor.tensor.requires_grad


def test_the_live_tensor_is_the_one_the_model_uses() -> None:
    whole = model()
    head = whole["head_comes_early"]
    assert isinstance(head, Head)
    with torch.no_grad():
        listed(whole)["table.weight"].tensor.fill_(2.0)
    assert head.weight.eq(2).all()


def test_a_cast_changes_no_flag() -> None:
    before, after = listed(model()), listed(model().bfloat16())
    for name, tensor in before.items():
        other = after[name]
        assert (tensor.shape, tensor.trained, tensor.decay, tensor.adapter) == (
            other.shape,
            other.trained,
            other.decay,
            other.adapter,
        )


def test_a_partitioned_parameter_is_listed_with_its_global_shape() -> None:
    whole = model()
    values = whole.get_parameter("inner.1.weight.values")
    setattr(values, "ds_shape", values.shape)  # noqa: B010
    values.data = torch.empty(0)
    assert listed(whole)["second.weight.values"].shape == (64, 16)


def on_ranks(ranks: int, vocabulary: int = 30) -> list[dict[str, LogicalTensor]]:
    """The tensors of every tensor rank, of a model with one layer of every kind."""
    found = []
    for rank in range(ranks):
        make = LayerFactory(
            seed=1,
            pattern=Pattern(2, 4),
            dense_layers={"whole": "listed"},
            adapter_rank=16,
            hold_column_mask=True,
            place=TensorPlace(rank, ranks),
        )
        layers = [
            make.token_embedding("table", vocabulary, 32, std=0.02),
            make.tied_head("table", vocabulary, 32, std=0.02),
            make.embedding("positions", 10, 32, std=0.02),
            make.linear("column", 64, 96, split="column", std=0.02),
            make.linear("row", 96, 64, split="row", std=0.02),
            make.linear("whole", 64, 32, split="whole", std=0.02),
            make.layer_norm("norm", 32),
        ]
        found.append(listed(nn.ModuleList(layers)))
    return found


def covered(tensors: list[LogicalTensor]) -> torch.Tensor:
    """How often each element of a logical tensor is owned."""
    count = torch.zeros(tensors[0].shape, dtype=torch.int64)
    for tensor in tensors:
        if tensor.owned:
            count[tuple(slice(*bounds) for bounds in tensor.rectangle)] += 1
    return count


@pytest.mark.parametrize("vocabulary", [30, 64, 5])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_tensor_ranks_own_covers_every_tensor_exactly_once(ranks: int, vocabulary: int) -> None:
    alone, *_ = on_ranks(1, vocabulary)
    found = on_ranks(ranks, vocabulary)
    for name, whole in alone.items():
        tensors = [rank[name] for rank in found]
        assert {tensor.shape for tensor in tensors} == {whole.shape}, name
        assert {(t.trained, t.decay, t.adapter) for t in tensors} == {(whole.trained, whole.decay, whole.adapter)}
        assert covered(tensors).eq(1).all(), name
    assert [set(rank) for rank in found] == [set(alone)] * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_split_and_where(ranks: int) -> None:
    found = on_ranks(ranks)
    split = {
        "table.weight": 0,
        "column.bias": 0,
        "column.weight.values": 0,
        "column.weight.indices": 0,
        "column.weight.column_mask": 0,
        "column.adapter.up": 0,
        "row.weight.values": 1,
        "row.weight.indices": 1,
        "row.weight.column_mask": 1,
        "row.adapter.down": 1,
    }
    for rank, tensors in enumerate(found):
        assert {name for name, tensor in tensors.items() if tensor.split} == set(split)
        for name, tensor in tensors.items():
            assert tensor.owned == (name in split or rank == 0), name
            if name not in split:
                assert tensor.rectangle == tuple((0, size) for size in tensor.shape), name
                continue
            dim = split[name]
            assert all(
                bounds == (0, size)
                for d, (bounds, size) in enumerate(zip(tensor.rectangle, tensor.shape, strict=True))
                if d != dim
            ), name
            # The live tensor begins with the rectangle; only a padded vocabulary has more than that.
            padding = tensor.tensor.numel() - rectangle_size(tensor.rectangle)
            assert padding == 0 or name == "table.weight", name
    rows = [tensors["table.weight"].rectangle[0] for tensors in found]
    assert rows == ([(0, 16), (16, 30)] if ranks == 2 else [(0, 8), (8, 16), (16, 24), (24, 30)])


def test_a_rank_may_own_no_row_of_a_small_vocabulary() -> None:
    rows = [tensors["table.weight"].rectangle[0] for tensors in on_ranks(4, vocabulary=5)]
    assert rows == [(0, 5), (5, 5), (5, 5), (5, 5)]
    assert {tensors["table.weight"].tensor.shape for tensors in on_ranks(4, vocabulary=5)} == {(8, 32)}
