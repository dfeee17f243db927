"""Without a GPU the Triton kernels run under its interpreter, which must be chosen before triton is imported."""

import os

import pytest
import torch

from slope_dist.sparse.kernels import primitives

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def plain_primitives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps between products by plain torch: Triton's interpreter takes a hundred times as long."""
    monkeypatch.setattr(primitives, "why_no_triton", lambda device_type: "not in this test")
