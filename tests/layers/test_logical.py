"""Every tensor of a model's state is listed once, under its global name, with the right flags.

Run: pytest tests/layers/test_logical.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slope_dist.layers import LayerFactory, LogicalTensor, TiedHead, logical_tensors
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
    assert isinstance(head, TiedHead)
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
