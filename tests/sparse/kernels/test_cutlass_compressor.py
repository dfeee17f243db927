"""For Hopper, CUTLASS's own compressor makes of a dense matrix the values and the metadata that we make of its mask.

Needs nvcc and the CUTLASS headers (CUDA_HOME or PATH; CUTLASS_PATH or the extra "cutlass"), no card; some seconds.

Run: pytest tests/sparse/kernels/test_cutlass_compressor.py
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slope_dist.sparse import CompressedMatrix, Pattern
from slope_dist.sparse.kernels.cutlass import layout, toolchain
from slope_dist.sparse.kernels.vendor import VendorError

SOURCE = Path(__file__).parent / "cutlass_compressor.cpp"


@pytest.fixture(scope="module")
def compress(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """The compressor on addresses: rows, columns, dense, values, metadata."""
    try:
        tools = toolchain.find()
    except VendorError as error:
        pytest.skip(str(error))
    output = tmp_path_factory.mktemp("compressor") / "compressor.so"
    flags = ["-std=c++20", "-O1", "-shared", "-Xcompiler", "-fPIC,-pthread", f"-I{tools.include}"]
    done = subprocess.run([tools.nvcc, *flags, SOURCE, "-o", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(output)).compress
    function.restype, function.argtypes = None, [ctypes.c_int] * 2 + [ctypes.c_void_p] * 3
    return function


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 192), (192, 64), (320, 192)])
def test_equal_bytes(compress: Callable[..., None], rows: int, columns: int) -> None:
    # No entry is zero: the compressor would look for others in its place, where a mask knows what is kept.
    matrix = CompressedMatrix.prune(1 + torch.rand(rows, columns).half(), Pattern(2, 4))
    dense = matrix.expand().contiguous()
    values, metadata = torch.empty_like(matrix.values), torch.empty(rows * columns // 8, dtype=torch.uint8)
    compress(rows, columns, dense.data_ptr(), values.data_ptr(), metadata.data_ptr())
    assert values.equal(matrix.values)
    assert layout.sm90(rows, columns).vendor(matrix.indices).equal(metadata)
