"""The kernels of `adamw` and `decode` compile for an A100 and an H100 on a machine that has neither.

Run: pytest tests/sparse/kernels/jit/test_compiles.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability."""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_for_a_card_that_is_not_there(capability: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tests.sparse.kernels.jit.compiling import compile_for; compile_for({capability})",
        ],
        cwd=request.config.rootpath,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    taken = [int(size) for size in re.findall(rf"sm_{capability} \w+ shared (\d+)", done.stdout)]
    assert len(taken) == 4 and all(size <= SHARED[capability] for size in taken)
