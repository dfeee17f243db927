"""Kernels are launched with the device of their operands current, which Triton does not see to.

Run: pytest tests/sparse/kernels/jit/test_current_device.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from slope_dist.sparse import CompressedMatrix, Pattern
from slope_dist.sparse.kernels import jit
from slope_dist.sparse.kernels.jit import adamw, decode, expand

MATRIX = CompressedMatrix.prune(torch.randn(8, 16), Pattern(2, 4))


class Kernel:
    """Stands for a kernel: notes what is current when it is launched."""

    def __init__(self, current: list[torch.device]) -> None:
        self.current = current
        self.launched: list[list[torch.device]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **constants: self.launched.append(list(self.current))


def run_expand() -> None:
    expand.expand(MATRIX.values, MATRIX.indices)


def run_decode() -> None:
    down, up = torch.randn(2, 16), torch.randn(8, 2)
    decode.decode(torch.randn(3, 16), MATRIX.values, MATRIX.indices, down=down, up=up)


def run_adamw() -> None:
    moments = (torch.zeros_like(MATRIX.values) for _ in range(3))
    numbers = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    adamw.adamw_step(MATRIX.values, *moments, MATRIX.indices, MATRIX.values, None, **numbers)


@pytest.mark.parametrize(
    ("run", "module", "kernels", "guarded"),
    [
        (run_expand, expand, ["_expand"], jit),
        (run_decode, decode, ["_product_kernel", "_finish_kernel"], decode),
        (run_adamw, adamw, ["_adamw_kernel"], adamw),
    ],
    ids=["expand", "decode", "adamw"],
)
def test_the_operands_device_is_current(
    run: Callable[[], None],
    module: ModuleType,
    kernels: list[str],
    guarded: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(guarded, "on", on)
    stand_in = Kernel(current)
    for kernel in kernels:
        monkeypatch.setattr(module, kernel, stand_in)
    run()
    assert stand_in.launched == [[torch.device("cpu")]] * len(kernels)
