"""A library of plain torch behind the C functions of a compiled kernel: it reads and writes through addresses."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import Pattern, reference
from slope_dist.sparse.kernels.cutlass import route, toolchain
from slope_dist.sparse.kernels.cutlass.tiles import Tile
from slope_dist.sparse.kernels.cutlass.toolchain import Toolchain

TOOLS = Toolchain(Path("/nowhere/nvcc"), "13.0.88", Path("/nowhere/include"), "4.2.0")
REFUSED = 7


def memory(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that lies at an address."""
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).view(shape)


@dataclass
class StandIn:
    """What `library.Library` is, with every call recorded."""

    architecture: str
    dtype: torch.dtype
    calls: list[tuple] = field(default_factory=list)
    code: int = 0

    def product(self, rows: int, columns: int, tokens: int, values, metadata, x, bias, addend, y, *rest: int) -> int:
        self.calls.append((values, metadata, x, bias, addend, y, *rest))
        if self.code:
            return self.code
        assert not any(address % 16 for address in self.calls[-1][:6] if address)
        order = route.LAYOUTS[self.architecture](rows, columns)
        indices = order.ours(memory(metadata, (rows * columns // 8,), torch.uint8), (rows, columns))
        kept = memory(values, (rows, columns // 2), self.dtype).float()
        total = reference.forward(memory(x, (tokens, columns), self.dtype).float(), kept, indices, Pattern(2, 4))
        if bias:
            total += memory(bias, (rows,), self.dtype)
        if addend:
            total += memory(addend, (tokens, rows), self.dtype)
        memory(y, (tokens, rows), self.dtype).copy_(total)
        return 0

    def reason(self, code: int) -> str:
        return f"reason {code}"


def cutlass_of(architecture: str, monkeypatch: pytest.MonkeyPatch) -> tuple[route.CutlassRoute, list[StandIn]]:
    """The route for an architecture that this machine need not have, and the libraries that it opens."""
    opened: list[StandIn] = []

    def open_library(tools: Toolchain, tile: Tile, dtype: torch.dtype) -> StandIn:
        assert tools is TOOLS and tile.architecture == architecture
        opened.append(StandIn(architecture, dtype))
        return opened[-1]

    monkeypatch.setattr(toolchain, "find", lambda: TOOLS)
    monkeypatch.setattr(route, "_architecture", lambda device: architecture)
    monkeypatch.setattr(route, "open_library", open_library)
    return route.CutlassRoute(torch.device("cpu")), opened
