"""Every CUTLASS kernel compiles for its architecture, spills nothing, and opens as a library, without a GPU.

Minutes: about one of one core for each kernel of Hopper. Needs nvcc and the CUTLASS headers.

Run: pytest tests/sparse/kernels/test_cutlass_compiles.py -m slow
"""

from __future__ import annotations

import pytest

from slope_dist.sparse.kernels.cutlass import build, toolchain
from slope_dist.sparse.kernels.vendor import VendorError


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_every_kernel_compiles(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        toolchain.find()
    except VendorError as error:
        pytest.skip(str(error))
    code = build.main(["--arch", architecture, "--compile-only"])
    assert code == 0, capsys.readouterr()
