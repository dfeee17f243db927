"""The codec is lossless at exactly one bit an element, its bytes are the documented ones, and bad metadata is refused.

Run: pytest tests/sparse/test_codec.py
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slope_dist.sparse import Pattern, codec, pruning
from tests.sparse import oracle

pytestmark = pytest.mark.usefixtures("nan_scratch")


def random_mask(rows: int, columns: int, n: int, m: int, seed: int) -> Tensor:
    scores = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(seed))
    return (scores.argsort(2).argsort(2) < n).view(rows, columns)


def valid_masks_of_a_byte(n: int, m: int) -> Iterator[Tensor]:
    """Every bool [1, 8] that keeps n in each m."""
    for groups in product(combinations(range(m), n), repeat=8 // m):
        kept = {m * g + position for g, group in enumerate(groups) for position in group}
        yield torch.tensor([[position in kept for position in range(8)]])


@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), eighths=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_round_trip_at_one_bit_an_element(n: int, m: int, rows: int, eighths: int, seed: int) -> None:
    pattern = Pattern(n, m)
    mask = random_mask(rows, 8 * eighths, n, m, seed)
    packed = codec.pack(mask, pattern)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, eighths)
    assert packed.untyped_storage().nbytes() == rows * eighths
    assert packed.tolist() == oracle.pack(mask, n, m)
    assert codec.mask_of(packed, pattern).equal(mask)
    codec.check(packed, pattern)
    columns = codec.columns_of(packed, pattern)
    assert columns.dtype == torch.int64
    assert columns.tolist() == [[c for c, kept in enumerate(row) if kept] for row in mask.tolist()]


@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
def test_every_valid_byte_round_trips_and_every_other_is_refused(n: int, m: int) -> None:
    pattern = Pattern(n, m)
    valid = set()
    for mask in valid_masks_of_a_byte(n, m):
        packed = codec.pack(mask, pattern)
        assert codec.mask_of(packed, pattern).equal(mask)
        valid.add(int(packed))
    assert len(valid) == {(1, 2): 16, (2, 4): 36, (2, 8): 28, (4, 8): 70}[n, m]
    accepted = set()
    for byte in range(256):
        try:
            codec.check(torch.tensor([[byte]], dtype=torch.uint8), pattern)
        except ValueError:
            continue
        accepted.add(byte)
    assert accepted == valid


@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
def test_check_names_the_first_bad_row(n: int, m: int) -> None:
    packed = codec.pack(random_mask(9, 48, n, m, 1), Pattern(n, m))
    packed[7, 5] = 0
    packed[4, 2] = 0
    with pytest.raises(ValueError, match=f"row 4 .*{n}:{m}"):
        codec.check(packed, Pattern(n, m))


@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
@pytest.mark.parametrize("wrong", ["one too many", "one too few", "moved to the next group", "all", "none"])
def test_pack_refuses_a_mask_that_does_not_keep_n_of_every_m(n: int, m: int, wrong: str) -> None:
    mask = random_mask(6, 32, n, m, 2)
    group, neighbour = mask[3, :m], mask[3, m : 2 * m]
    if wrong in ("one too many", "moved to the next group"):
        group[int((~group).nonzero()[0])] = True
    if wrong == "one too few":
        group[int(group.nonzero()[0])] = False
    if wrong == "moved to the next group":
        # The row still keeps the right number, only not in each group.
        neighbour[int(neighbour.nonzero()[0])] = False
        assert int(mask[3].sum()) == 32 * n // m
    if wrong == "all":
        mask[:] = True
    if wrong == "none":
        mask[:] = False
    with pytest.raises(ValueError, match=f"exactly {n} of {m}"):
        codec.pack(mask, Pattern(n, m))


@pytest.mark.parametrize(("n", "m", "columns"), [(1, 2, 6), (1, 2, 10), (2, 4, 4), (2, 4, 12), (4, 8, 12)])
def test_pack_refuses_rows_that_are_not_whole_bytes(n: int, m: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{columns} columns are not a multiple of 8"):
        codec.pack(torch.ones(2, columns, dtype=torch.bool), Pattern(n, m))


def test_any_mask_packs_to_bits() -> None:
    mask = torch.rand(7, 40) < 0.3
    packed = codec.pack_bits(mask)
    assert packed.tolist() == oracle.pack(mask, 0, 8)
    assert codec.unpack_bits(packed).equal(mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
def test_expand_and_gather_undo_each_other_to_the_bit(n: int, m: int, dtype: torch.dtype) -> None:
    pattern = Pattern(n, m)
    mask = random_mask(16, 24, n, m, 3)
    dense = oracle.difficult_matrix("signed zeros", 16, 24, dtype)
    packed = codec.pack(mask, pattern)
    values = codec.gather(dense, packed, pattern)
    assert oracle.same_bits(values, oracle.kept_entries(dense, mask))
    expanded = codec.expand(values, packed, pattern)
    assert oracle.same_bits(expanded, torch.where(mask, dense, torch.zeros((), dtype=dtype)))
    assert oracle.same_bits(codec.gather(expanded, packed, pattern), values)


def test_a_mask_that_is_not_contiguous_packs_alike() -> None:
    mask = random_mask(16, 32, 2, 4, 4)
    strided = mask.t().contiguous().t()
    assert not strided.is_contiguous()
    assert codec.pack(strided, Pattern(2, 4)).equal(codec.pack(mask, Pattern(2, 4)))


class OnOneDevice(TorchDispatchMode):
    """Fails where an operator takes or gives a tensor of any device but `meta`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        assert found <= {"meta"}, f"{func} on {found}"
        return result


@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
def test_on_another_device_nothing_comes_from_the_host_or_waits_for_it(n: int, m: int) -> None:
    """A copy from the host, or a shape that depends on data, can be part of no CUDA graph."""
    pattern = Pattern(n, m)
    dense, mask = torch.empty(16, 32, device="meta"), torch.empty(16, 32, device="meta", dtype=torch.bool)
    with OnOneDevice():
        packed = codec.encode(mask, pattern)
        values = codec.gather(dense, packed, pattern)
        assert codec.expand(values, packed, pattern).shape == (16, 32)
        assert codec.mask_of(packed, pattern).shape == (16, 32)
        for kept in (None, codec.unpack_bits(codec.pack_bits(mask))):
            transposed, indices = pruning.doubly_pruned_transpose(values, packed, pattern, kept)
            assert transposed.shape == (32, pattern.kept(16))
            assert indices.shape == (32, 2)
