"""Every kernel that moves or prunes compiles for A100 and Hopper: the compiler refuses what the interpreter takes.

Run: pytest tests/sparse/kernels/jit/test_compile_only.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_compiles_for_a_gpu_that_is_not_here(capability: int, tmp_path: Path) -> None:
    # A process of its own: this one may have chosen the interpreter, and old results must not stand for new ones.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sparse.kernels.jit.compile_only", str(capability)],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 14
