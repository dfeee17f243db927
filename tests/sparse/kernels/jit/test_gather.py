"""The gather kernel moves the bits that the loop and `codec.gather` move, and writes nothing else.

Run: pytest tests/sparse/kernels/jit/test_gather.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse import Pattern, codec
from slope_dist.sparse.kernels.jit.gather import gather
from tests.sparse import oracle
from tests.sparse.kernels.devices import DEVICES

PATTERN = Pattern(2, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = [pytest.mark.parametrize("device", DEVICES)]


@pytest.mark.usefixtures("guarded_scratch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(4, 8), (12, 24), (36, 136), (64, 512)])
def test_equals_the_loop_and_the_codec(rows: int, columns: int, kind: str, dtype: torch.dtype, device: str) -> None:
    dense = oracle.difficult_matrix(kind, rows, columns, dtype)
    # The mask of another matrix: what is gathered is a gradient, which knows nothing of magnitudes.
    mask = oracle.row_mask(torch.randn(rows, columns), 2, 4)
    indices = codec.pack(mask, PATTERN)
    kept = gather(dense.to(device), indices.to(device)).cpu()
    assert oracle.same_bits(kept, oracle.kept_entries(dense, mask))
    assert oracle.same_bits(kept, codec.gather(dense, indices, PATTERN))


@pytest.mark.usefixtures("guarded_scratch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bits_at_any_address(dtype: torch.dtype, device: str) -> None:
    integer = codec.as_integers(torch.empty(0, dtype=dtype)).dtype
    bounds = torch.iinfo(integer)
    # One entry off: no load may take the address for a multiple of more than an entry.
    flat = torch.randint(bounds.min, bounds.max, (20 * 136 + 1,)).to(integer).view(dtype)
    mask = oracle.row_mask(torch.randn(20, 136), 2, 4)
    kept = gather(flat.to(device)[1:].view(20, 136), codec.pack(mask, PATTERN).to(device))
    assert oracle.same_bits(kept.cpu(), oracle.kept_entries(flat[1:].view(20, 136), mask))


def test_into_a_part_of_another_matrix(device: str) -> None:
    dense, mask = torch.randn(24, 136), oracle.row_mask(torch.randn(24, 136), 2, 4)
    whole = torch.zeros(40, 68, device=device)
    gather(dense.to(device), codec.pack(mask, PATTERN).to(device), whole[8:32])
    assert oracle.same_bits(whole[8:32].cpu(), oracle.kept_entries(dense, mask))
    assert not whole[:8].any() and not whole[32:].any()
    for wrong in (whole[8:31], whole[8:32].double(), whole.view(20, 136)[:, :68]):
        with pytest.raises(ValueError, match=r"do not go into|not contiguous"):
            gather(dense.to(device), codec.pack(mask, PATTERN).to(device), wrong)


def test_an_empty_matrix_is_no_launch(device: str) -> None:
    kept = gather(torch.zeros(0, 16, device=device), torch.zeros(0, 2, dtype=torch.uint8, device=device))
    assert kept.shape == (0, 8)


@pytest.mark.parametrize(
    ("dense", "indices", "message"),
    [
        (torch.zeros(4, 16), torch.zeros(4, 3, dtype=torch.uint8), r"\[4, 16\] do not belong to metadata \[4, 3\]"),
        (torch.zeros(4, 16), torch.zeros(4, 2, dtype=torch.int32), "metadata must be uint8"),
        (torch.zeros(4, 16), torch.zeros(8, dtype=torch.uint8), "metadata must be uint8"),
        (torch.zeros(16, 4).t(), torch.zeros(4, 2, dtype=torch.uint8), "not contiguous"),
        (torch.zeros(4, 16, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.uint8), "not torch.float64"),
        (torch.zeros(4, 16), torch.zeros(4, 2, dtype=torch.uint8, device="meta"), "metadata is on meta"),
    ],
    ids=["shape", "dtype", "dimensions", "strides", "width", "device"],
)
def test_what_does_not_belong_together_is_refused(dense, indices, message: str, device: str) -> None:
    packed = indices if indices.is_meta else indices.to(device)
    with pytest.raises(ValueError, match=message):
        gather(dense.to(device), packed)
