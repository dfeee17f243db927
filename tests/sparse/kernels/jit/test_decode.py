"""The skinny product of 1 to 32 tokens is the reference's over the dense weight, with adapter and bias.

Run: pytest tests/sparse/kernels/jit/test_decode.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import CompressedMatrix, Pattern, codec, reference
from slope_dist.sparse.kernels.jit.decode import FEW, decode
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.oracle import difficult_matrix, same_bits

PATTERN = Pattern(2, 4)
BOUNDS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
"""Relative norm of the error, against fp64: rounding of the result and no more."""

pytestmark = [
    pytest.mark.usefixtures("nan_scratch"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)


def weight(rows: int, columns: int, dtype: torch.dtype, device: str, kind: str = "random") -> CompressedMatrix:
    skip_rounding(dtype, device)
    matrix = CompressedMatrix.prune(difficult_matrix(kind, rows, columns, dtype), PATTERN)
    return CompressedMatrix(matrix.values.to(device), matrix.indices.to(device), PATTERN)


def skip_rounding(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter does not compute in bf16")


def expected(x: Tensor, matrix: CompressedMatrix, bias=None, down=None, up=None, scale: float = 1.0) -> Tensor:
    """In fp64, from the same rounded numbers."""
    y = reference.forward(x.double(), matrix.values.double(), matrix.indices, PATTERN)
    if down is not None:
        y = y + (x.double() @ down.double().t() * scale) @ up.double().t()
    return y if bias is None else y + bias.double()


def error(actual: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(actual.double() - exact) / torch.linalg.vector_norm(exact))


@on_devices
@dtypes
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rank", [0, 16, 24])
@pytest.mark.parametrize("tokens", [1, 2, *(pytest.param(t, marks=pytest.mark.slow) for t in (7, 16)), 32])
def test_is_the_reference(tokens: int, rank: int, biased: bool, dtype: torch.dtype, device: str) -> None:
    rows, columns = 72, 1048
    matrix = weight(rows, columns, dtype, device)
    x = torch.randn(tokens, columns, dtype=dtype, device=device)
    factors = {}
    if rank:
        factors = {
            "down": torch.randn(rank, columns, dtype=dtype, device=device),
            "up": torch.randn(rows, rank, dtype=dtype, device=device),
            "scale": 1 / rank,
        }
    bias = torch.randn(rows, dtype=dtype, device=device) * 20 if biased else None
    y = decode(x, matrix.values, matrix.indices, bias=bias, **factors)
    assert y.shape == (tokens, rows) and y.dtype == dtype
    assert error(y, expected(x, matrix, bias, **factors)) < BOUNDS[dtype]


@on_devices
@pytest.mark.parametrize("tokens", [1, 5])
def test_ranks_of_several_blocks(tokens: int, device: str) -> None:
    matrix = weight(40, 72, torch.float32, device)
    x, down = torch.randn(tokens, 72, device=device), torch.randn(136, 72, device=device)
    factors = {"down": down, "up": torch.randn(40, 136, device=device), "scale": 1 / 136}
    assert error(decode(x, matrix.values, matrix.indices, **factors), expected(x, matrix, **factors)) < 1e-6


@on_devices
@dtypes
@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("shape", [(8, 8), (16, 72), (200, 264), (40, 4104)], ids=lambda s: "x".join(map(str, s)))
def test_shapes_that_are_no_whole_blocks(shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: str) -> None:
    matrix = weight(*shape, dtype, device)
    x = torch.randn(tokens, shape[1], dtype=dtype, device=device)
    y = decode(x, matrix.values, matrix.indices)
    assert error(y, expected(x, matrix)) < BOUNDS[dtype]
    assert same_bits(y, decode(x, matrix.values, matrix.indices))


@on_devices
@pytest.mark.parametrize("tokens", [1, 5])
def test_kept_zeros_keep_their_places(tokens: int, device: str) -> None:
    """Each value stands where its code says, whatever it is: with one-hot rows of X, Y is the weight's columns."""
    matrix = weight(24, 64, torch.float16, device, "signed zeros")
    dense = codec.expand(matrix.values, matrix.indices, PATTERN)
    for first in range(0, 64 - tokens, tokens):
        x = torch.eye(64, dtype=torch.float16, device=device)[first : first + tokens]
        assert torch.equal(decode(x, matrix.values, matrix.indices), dense.t()[first : first + tokens])


@on_devices
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_what_is_not_finite(tokens: int, bad: float, device: str) -> None:
    """A kept entry makes of it what the reference does; a pruned one takes no part up to FEW tokens, or makes NaN."""
    matrix = weight(32, 64, torch.float32, device)
    kept = codec.mask_of(matrix.indices, PATTERN)[:, 13]
    x = torch.randn(tokens, 64, device=device)
    without = x.clone()
    x[tokens - 1, 13], without[tokens - 1, 13] = bad, 0.0
    y, exact = decode(x, matrix.values, matrix.indices), expected(x, matrix)
    assert 0 < kept.sum() < 32
    assert torch.equal(torch.isnan(y[-1, kept]), torch.isnan(exact[-1, kept]))
    assert not torch.isfinite(y[-1, kept]).any() and torch.isfinite(y[:-1]).all()
    if bad == float("inf"):
        assert torch.equal(y[-1, kept].double(), exact[-1, kept])
    if tokens <= FEW:
        assert torch.allclose(y[-1, ~kept].double(), expected(without, matrix)[-1, ~kept])
    else:
        assert torch.isnan(y[-1, ~kept]).all() and torch.isnan(exact[-1, ~kept]).all()


@on_devices
def test_odd_addresses_and_strides(device: str) -> None:
    """A weight in the middle of a flat buffer, as DeepSpeed keeps it, and X that is no contiguous tensor."""
    matrix = weight(24, 64, torch.float16, device)
    flat = torch.empty(matrix.values.numel() + 1, dtype=torch.float16, device=device)
    moved = flat[1:].view_as(matrix.values).copy_(matrix.values)
    assert moved.data_ptr() % 8
    for tokens in (2, 9):
        x = torch.randn(64, tokens, dtype=torch.float16, device=device).t()
        assert error(decode(x, moved, matrix.indices), expected(x, matrix)) < BOUNDS[torch.float16]
