"""What tests of kernels share."""

import pytest

from slope_dist.sparse.kernels import primitives


@pytest.fixture
def plain_primitives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps between products by plain torch: Triton's interpreter takes a hundred times as long."""
    monkeypatch.setattr(primitives, "why_no_triton", lambda device_type: "not in this test")
