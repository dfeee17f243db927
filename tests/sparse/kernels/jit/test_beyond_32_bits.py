"""The kernels reach past 2^31 entries: the last rows of a matrix of 2^32 are those of the same rows alone.

Skipped, with the reason, where there is no GPU or not 48 GiB of it.

Run: pytest tests/sparse/kernels/jit/test_beyond_32_bits.py -m gpu
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse import Pattern, codec, pruning
from slope_dist.sparse.kernels.jit.expand import doubly_pruned, expand
from slope_dist.sparse.kernels.jit.gather import gather
from slope_dist.sparse.kernels.jit.transpose import transpose
from tests.sparse.oracle import same_bits

PATTERN = Pattern(2, 4)
ROWS, COLUMNS, LAST = 2**17 + 24, 2**15, 152

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_the_last_rows_are_right() -> None:
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("less than 48 GiB of GPU memory is free")
    valid = torch.tensor([first | second << 2 for second in range(4) for first in range(second)], dtype=torch.uint8)
    nibbles = valid.cuda()[torch.randint(6, (ROWS // 8, COLUMNS // 4), device="cuda")].view(ROWS // 8, -1, 2)
    indices = (nibbles[..., 0] | nibbles[..., 1] << 4).repeat(8, 1)
    # Finite numbers: a GPU may change the bits of NaN where the twin takes magnitudes.
    values = torch.empty(ROWS, COLUMNS // 2, dtype=torch.int16, device="cuda").random_(0, 0x7F80).view(torch.bfloat16)
    last = values[-LAST:].clone(), indices[-LAST:].clone(), PATTERN

    dense = expand(values, indices)
    assert same_bits(dense[-LAST:], codec.expand(*last))
    assert same_bits(gather(dense, indices), values)
    del dense
    assert same_bits(doubly_pruned(values, indices)[-LAST:], pruning.doubly_pruned(*last))
    transposed, transposed_indices = transpose(values, indices)
    twin = pruning.doubly_pruned_transpose(*last)
    assert same_bits(transposed[:, -LAST // 2 :].contiguous(), twin[0])
    assert same_bits(transposed_indices[:, -LAST // 8 :].contiguous(), twin[1])
