"""A rehearsal computes on its "card" what the CPU computes, keeps account of its memory, and refuses other kernels.

Run: tests/rehearsal/rehearse.sh true && pytest tests/rehearsal
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed import ROOT

REHEARSE = Path(__file__).with_name("rehearse.sh")

pytestmark = pytest.mark.skipif(
    not (ROOT / "build/rehearsal/.installed").exists(), reason="rehearse.sh, which installs 5 GB, has not been run here"
)

PROGRAM = """
import torch
from torch.nn import functional

assert torch.cuda.device_count() == 2
x = torch.randn(64, 48, dtype=torch.bfloat16)
gradients = []
for device in ("cpu", "cuda"):
    leaf, weight = (t.clone().to(device).requires_grad_() for t in (x, x[:32]))
    q = functional.linear(leaf, weight).view(1, 64, 4, 8).transpose(1, 2)
    functional.scaled_dot_product_attention(q, q, q, is_causal=True).float().square().sum().backward()
    gradients.append([t.grad.cpu().float() for t in (leaf, weight)])
for right, found in zip(*gradients):
    assert float((found - right).norm() / right.norm()) < 2e-2
held = torch.empty(3, 2**20, device="cuda:1")
assert torch.cuda.memory_allocated(1) == held.nbytes and held.mul_(0).sum().item() == 0
try:
    torch.cuda._sleep(1)
except RuntimeError as error:
    print("refused:", error)
"""


def test_the_numbers_are_the_cpus_and_no_kernel_runs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"VCARD_COUNT": "2"}
    done = subprocess.run(
        [str(REHEARSE), "python", "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "refused: CUDA error: not possible in a rehearsal" in done.stdout
    assert "spin_kernel" in done.stderr and "there is no card" in done.stderr
