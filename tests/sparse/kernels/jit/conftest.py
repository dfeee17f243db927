"""What the kernels write to is filled with NaN, lies between margins, and must leave the margins alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.sparse.oracle import same_bits

# A multiple of 16 bytes whatever the dtype, so the kernels see what a fresh tensor would show them.
MARGIN = 64


@pytest.fixture
def guarded_scratch(nan_scratch: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` hands out the middle of a larger NaN-filled tensor; what lies outside is compared afterwards."""
    empty, handed_out = torch.empty, []

    def guarded(*size, **options) -> Tensor:
        shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
        whole = empty(shape.numel() + 2 * MARGIN, **options)
        handed_out.append((whole, whole.clone()))
        return whole[MARGIN : MARGIN + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    monkeypatch.undo()
    assert handed_out
    for whole, before in handed_out:
        assert same_bits(whole[:MARGIN], before[:MARGIN])
        assert same_bits(whole[-MARGIN:], before[-MARGIN:])
