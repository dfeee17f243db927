"""A sparse weight's truth is (values, indices), nothing derived is state, and in bf16 it takes 9 bits an element.

Run: pytest tests/sparse/test_weight.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from slope_dist.sparse import CompressedMatrix, Pattern, SparseWeight, Weight, codec
from tests.sparse import oracle

OUT, IN = 48, 80
TWO_FOUR = Pattern(2, 4)


def sparse_weight(**options: bool) -> SparseWeight:
    return SparseWeight(CompressedMatrix.prune(torch.randn(OUT, IN), TWO_FOUR), **options)


def held_mask(weight: SparseWeight) -> Tensor:
    assert weight.column_mask is not None
    return weight.column_mask


def w_rc(weight: SparseWeight, magnitudes_of: Tensor | None = None) -> Tensor:
    """W^{R,C} by the oracle, its second mask from the magnitudes of another dense weight if one is given."""
    dense = codec.expand(weight.values.detach(), weight.indices, TWO_FOUR)
    kept = codec.mask_of(weight.indices, TWO_FOUR)
    mask = oracle.column_mask(dense if magnitudes_of is None else magnitudes_of, kept, 2, 4)
    return torch.where(mask, dense, torch.zeros((), dtype=dense.dtype))


def input_gradient_matrix(weight: Weight) -> Tensor:
    """The matrix the input gradient is a product with, read off by one-hot output gradients: [O, I]."""
    x = torch.zeros(OUT, IN, dtype=weight.values.dtype, requires_grad=True)
    weight(x).backward(torch.eye(OUT, dtype=weight.values.dtype))
    return oracle.gradient(x)


def bits_an_element(tensors: Iterable[Tensor]) -> float:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return 8 * sum(storages.values()) / (OUT * IN)


def test_values_is_an_ordinary_parameter_and_metadata_is_no_parameter() -> None:
    weight = sparse_weight(hold_column_mask=True)
    parameters, buffers = dict(weight.named_parameters()), dict(weight.named_buffers())
    assert list(parameters) == ["values"] and type(weight.values) is nn.Parameter
    assert parameters["values"].shape == (OUT, IN // 2)
    assert {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()} == {
        "indices": ((OUT, IN // 8), torch.uint8),
        "column_mask": ((OUT, IN // 8), torch.uint8),
    }


def test_metadata_as_a_parameter_is_frozen_and_computes_the_same() -> None:
    buffer = sparse_weight(hold_column_mask=True)
    parameter = SparseWeight(buffer.matrix(), hold_column_mask=True, metadata_as_parameter=True)
    assert not list(parameter.buffers())
    assert {name for name, p in parameter.named_parameters() if not p.requires_grad} == {"indices", "column_mask"}
    x = torch.randn(3, IN)
    assert parameter(x).equal(buffer(x))
    assert input_gradient_matrix(parameter).equal(input_gradient_matrix(buffer))
    assert parameter.indices.grad is None and held_mask(parameter).grad is None
    assert parameter.state_dict().keys() == buffer.state_dict().keys()


def test_a_resident_transpose_of_sharded_metadata_is_refused() -> None:
    with pytest.raises(ValueError, match="full replica"):
        sparse_weight(resident_transpose=True, metadata_as_parameter=True)


@pytest.mark.parametrize("options", [{}, {"hold_column_mask": True}, {"resident_transpose": True}], ids=str)
def test_forward_is_over_w_r_and_backward_over_w_r_c(options: dict[str, bool]) -> None:
    weight = sparse_weight(**options)
    x = torch.randn(5, IN)
    dense = codec.expand(weight.values.detach(), weight.indices, TWO_FOUR)
    torch.testing.assert_close(weight(x), x @ dense.t())
    assert input_gradient_matrix(weight).equal(w_rc(weight))


def test_a_resident_transpose_is_a_cache_and_never_state() -> None:
    weight = sparse_weight(resident_transpose=True)
    input_gradient_matrix(weight)
    values, indices = weight.transpose()
    assert weight.transpose()[0] is values
    assert (values.shape, indices.shape) == ((IN, OUT // 2), (IN, OUT // 8))
    assert not values.requires_grad
    listed = [*weight.parameters(), *weight.buffers(), *weight.state_dict().values()]
    assert not any(tensor.data_ptr() in (values.data_ptr(), indices.data_ptr()) for tensor in listed)
    assert set(weight.state_dict()) == {"values", "indices"}


def test_a_resident_transpose_follows_the_values_once_told() -> None:
    weight = sparse_weight(resident_transpose=True)
    before = input_gradient_matrix(weight)
    with torch.no_grad():
        weight.values.copy_(torch.randn_like(weight.values))
    assert input_gradient_matrix(weight).equal(before)
    weight.values_changed()
    after = input_gradient_matrix(weight)
    assert after.equal(w_rc(weight)) and not after.equal(before)


def test_no_transpose_is_made_where_there_will_be_no_backward() -> None:
    weight = sparse_weight(resident_transpose=True)
    with torch.no_grad():
        weight(torch.randn(3, IN))
    assert weight._transpose is None


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
def test_a_held_column_mask_changes_only_when_refreshed(resident: bool) -> None:
    weight = sparse_weight(hold_column_mask=True, resident_transpose=resident)
    old = codec.expand(weight.values.detach().clone(), weight.indices, TWO_FOUR)
    assert input_gradient_matrix(weight).equal(w_rc(weight))
    with torch.no_grad():
        weight.values.copy_(torch.randn_like(weight.values))
    weight.values_changed()
    held = held_mask(weight).clone()
    stale = input_gradient_matrix(weight)
    assert stale.equal(w_rc(weight, magnitudes_of=old)) and not stale.equal(w_rc(weight))
    weight.state_dict()
    assert held_mask(weight).equal(held)
    weight.refresh_column_mask()
    assert not held_mask(weight).equal(held)
    assert input_gradient_matrix(weight).equal(w_rc(weight))


def test_a_held_column_mask_travels_with_the_matrix() -> None:
    weight = sparse_weight(hold_column_mask=True)
    with torch.no_grad():
        weight.values.copy_(torch.randn_like(weight.values))
    shards = [SparseWeight(weight.matrix().shard(0, rank, 2), hold_column_mask=True) for rank in range(2)]
    joined = torch.cat([held_mask(shard) for shard in shards])
    assert joined.equal(held_mask(weight))
    whole = input_gradient_matrix(weight)
    for rank, shard in enumerate(shards):
        x = torch.zeros(OUT // 2, IN, requires_grad=True)
        shard(x).backward(torch.eye(OUT // 2))
        assert oracle.gradient(x).equal(whole[rank * OUT // 2 : (rank + 1) * OUT // 2])


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16()": lambda module: module.bfloat16(),
    "half()": lambda module: module.half(),
    "double()": lambda module: module.double(),
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
}


@pytest.mark.parametrize("as_parameter", [False, True], ids=["buffer", "parameter"])
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_of_the_module_leaves_metadata_alone(name: str, as_parameter: bool) -> None:
    weight = sparse_weight(hold_column_mask=True, metadata_as_parameter=as_parameter)
    indices, mask = weight.indices.clone(), held_mask(weight).clone()
    before_rounding = weight.matrix().expand()
    CASTS[name](nn.Sequential(weight))
    assert weight.values.dtype != torch.float32
    assert weight.indices.dtype == held_mask(weight).dtype == torch.uint8
    assert weight.indices.equal(indices) and held_mask(weight).equal(mask)
    assert input_gradient_matrix(weight).equal(w_rc(weight, magnitudes_of=before_rounding))


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_of_the_module_drops_the_resident_transpose(name: str) -> None:
    weight = sparse_weight(resident_transpose=True)
    weight.transpose()
    CASTS[name](nn.Sequential(weight))
    assert weight._transpose is None
    assert weight.transpose()[0].dtype == weight.values.dtype
    assert input_gradient_matrix(weight).equal(w_rc(weight))


def test_a_copy_is_independent() -> None:
    weight = sparse_weight(resident_transpose=True)
    before = input_gradient_matrix(weight)
    twin = copy.deepcopy(weight)
    with torch.no_grad():
        twin.values.zero_()
    twin.values_changed()
    assert input_gradient_matrix(weight).equal(before)
    assert not input_gradient_matrix(twin).any()


def test_state_loads_into_a_weight_of_another_mask() -> None:
    source, target = sparse_weight(), sparse_weight()
    assert not source.indices.equal(target.indices)
    target.load_state_dict(source.state_dict())
    target.values_changed()
    assert oracle.same_bits(target.matrix().expand(), source.matrix().expand())


def test_a_bf16_weight_takes_nine_bits_an_element() -> None:
    weight = sparse_weight().bfloat16()
    assert bits_an_element([*weight.parameters(), *weight.buffers()]) == 9


def test_a_resident_transpose_costs_nine_more_bits() -> None:
    weight = sparse_weight(resident_transpose=True).bfloat16()
    weight(torch.randn(4, IN, dtype=torch.bfloat16)).sum().backward()
    assert bits_an_element(weight.cached_tensors()) == 9
    assert bits_an_element([*weight.parameters(), *weight.buffers(), *weight.cached_tensors()]) == 18


def test_a_held_column_mask_costs_one_more_bit() -> None:
    weight = sparse_weight(hold_column_mask=True).bfloat16()
    assert bits_an_element([*weight.parameters(), *weight.buffers()]) == 10
