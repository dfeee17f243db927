"""The sparse room imports without triton and without a GPU; the import compiles nothing and opens no library.

Run: pytest tests/sparse/kernels/test_importable.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

IMPORT = "import slope_dist.sparse, slope_dist.sparse.kernels"

WITHOUT_TRITON = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name=name)
sys.meta_path.insert(0, Absent())
{IMPORT}
"""

WATCHED = f"""
import sys, torch
before = set(sys.modules)
WATCHED = ("ctypes.dlopen", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
def refuse(event, arguments):
    if event in WATCHED:
        raise AssertionError(f"the import did {{event}} {{arguments}}")
sys.addaudithook(refuse)
{IMPORT}
new = {{name for name in set(sys.modules) - before if name.startswith(("triton", "torch.utils.cpp_extension"))}}
assert not new, new
"""


@pytest.mark.parametrize("program", [WITHOUT_TRITON, WATCHED], ids=["without triton", "watched"])
def test_the_room_imports_in_a_fresh_process(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
