"""On a GPU the plain-torch products give what they give on the CPU: outputs and all gradients, in every dtype.

Nothing in here is about speed. Skipped, with the reason, where there is no GPU.

Run: pytest tests/sparse/test_on_gpu.py -m gpu
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse import CompressedMatrix, Pattern, SparseWeight, codec, pruning
from slope_dist.sparse.kernels import measuring
from tests.sparse.oracle import KINDS, PATTERNS, difficult_matrix, gradient, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.usefixtures("nan_scratch"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern[0]}:{pattern[1]}")
def test_masks_and_metadata_are_those_of_the_cpu(pattern: tuple[int, int], kind: str) -> None:
    dense = difficult_matrix(kind, 64, 96)
    here = CompressedMatrix.prune(dense, Pattern(*pattern))
    there = CompressedMatrix.prune(dense.cuda(), Pattern(*pattern))
    assert same_bits(there.values.cpu(), here.values) and same_bits(there.indices.cpu(), here.indices)
    masks = [codec.pack_bits(pruning.column_mask(m.values, m.indices, m.pattern)).cpu() for m in (here, there)]
    assert same_bits(*masks)


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 256])
def test_products_and_gradients(dtype: torch.dtype, tokens: int, resident: bool) -> None:
    matrix = CompressedMatrix.prune(torch.randn(96, 160).to(dtype), Pattern(2, 4))
    x, grad_y = torch.randn(tokens, 160).to(dtype), torch.randn(tokens, 96).to(dtype)
    results = []
    # The CPU in fp64 is the reference, from the same rounded numbers.
    for device, precision in (("cpu", torch.float64), ("cuda", dtype)):
        weight = SparseWeight(matrix, resident_transpose=resident).to(device, precision)
        leaf = x.to(device, precision).requires_grad_()
        y = weight(leaf)
        y.backward(grad_y.to(device, precision))
        results.append([t.detach().cpu().double() for t in (y, gradient(leaf), gradient(weight.values))])
    for reference, actual in zip(*results, strict=True):
        off = torch.linalg.vector_norm(actual - reference) / torch.linalg.vector_norm(reference)
        assert off < measuring.bound(dtype, max(tokens, 160))


def test_compiles_whole() -> None:
    weight = SparseWeight(CompressedMatrix.prune(torch.randn(64, 64), Pattern(2, 4))).cuda()
    x = torch.randn(8, 64, device="cuda")
    compiled = torch.compile(weight, fullgraph=True)
    assert torch.allclose(compiled(x), weight(x), rtol=1e-4, atol=1e-4)
