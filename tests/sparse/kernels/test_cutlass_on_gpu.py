"""On a card, every CUTLASS kernel gives the reference's product: odd shapes, bias, addend, graphs, other streams.

Compiles at first use: minutes. Needs a card of compute capability 8.0 or 9.0, nvcc and the CUTLASS headers.

Run: pytest tests/sparse/kernels/test_cutlass_on_gpu.py -m gpu
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import CompressedMatrix, Pattern, reference
from slope_dist.sparse.kernels.cutlass.route import MULTIPLES, CutlassRoute
from slope_dist.sparse.kernels.cutlass.tiles import Tile
from slope_dist.sparse.kernels.problem import Problem
from slope_dist.sparse.kernels.vendor import VendorError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.usefixtures("nan_scratch"),
]

# One rounding of the result: half a unit in its last place.
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
TILES = range(4)
SHAPES = [(1, 64, 64), (63, 192, 320), (300, 448, 1024), (257, 1088, 192), (1024, 512, 2048)]


@pytest.fixture(scope="module")
def cutlass() -> CutlassRoute:
    try:
        return CutlassRoute(torch.device("cuda"))
    except VendorError as error:
        pytest.skip(str(error))


def operands(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[CompressedMatrix, Tensor]:
    dense = torch.randn(rows, columns, device="cuda").to(dtype)
    return CompressedMatrix.prune(dense, Pattern(2, 4)), torch.randn(tokens, columns, device="cuda").to(dtype)


def tile_of(cutlass: CutlassRoute, number: int, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> Tile:
    problem = Problem(tokens, rows, columns, dtype, torch.device("cuda"))
    assert cutlass.unsupported(problem) is None
    return cutlass.algorithms(problem)[number]


def distance(actual: Tensor, matrix: CompressedMatrix, x: Tensor, *added: Tensor) -> float:
    right = reference.forward(x.double(), matrix.values.double(), matrix.indices, matrix.pattern)
    right = sum((part.double() for part in added), start=right)
    return float(torch.linalg.vector_norm(actual.double() - right) / torch.linalg.vector_norm(right))


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", TILES)
def test_products(cutlass: CutlassRoute, number: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, columns = shape
    matrix, x = operands(tokens, rows, columns, dtype)
    bias, addend = (torch.randn(*size, device="cuda").to(dtype) for size in ((rows,), (tokens, rows)))
    before = addend.clone()
    metadata = cutlass.metadata_layout(rows, columns, dtype).vendor(matrix.indices)
    tile = tile_of(cutlass, number, tokens, rows, columns, dtype)
    parts = (x, matrix.values, matrix.indices)
    assert distance(cutlass.product(*parts, metadata, tile), matrix, x) < BOUNDS[dtype]
    assert distance(cutlass.product(*parts, None, tile, bias=bias), matrix, x, bias) < BOUNDS[dtype]
    assert distance(cutlass.product(*parts, metadata, tile, addend=addend), matrix, x, addend) < BOUNDS[dtype]
    both = cutlass.product(*parts, metadata, tile, bias=bias, addend=addend)
    assert distance(both, matrix, x, bias, addend) < BOUNDS[dtype]
    assert addend.equal(before)
    assert both.equal(cutlass.product(*parts, metadata, tile, bias=bias, addend=addend))


@pytest.mark.parametrize("number", TILES)
def test_the_least_supported_sizes(cutlass: CutlassRoute, number: int) -> None:
    rows, columns = MULTIPLES[cutlass.architecture]
    matrix, x = operands(1, rows, columns, torch.float16)
    tile = tile_of(cutlass, number, 1, rows, columns, torch.float16)
    assert distance(cutlass.product(x, matrix.values, matrix.indices, None, tile), matrix, x) < BOUNDS[torch.float16]


@pytest.mark.parametrize("number", TILES)
def test_values_change_and_are_read_anew_from_a_graph(cutlass: CutlassRoute, number: int) -> None:
    matrix, x = operands(128, 256, 512, torch.bfloat16)
    metadata = cutlass.metadata_layout(256, 512, torch.bfloat16).vendor(matrix.indices)
    tile = tile_of(cutlass, number, 128, 256, 512, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cutlass.product(x, matrix.values, matrix.indices, metadata, tile)
    for _ in range(2):
        matrix.values.normal_()
        graph.replay()
        assert distance(y, matrix, x) < BOUNDS[torch.bfloat16]
