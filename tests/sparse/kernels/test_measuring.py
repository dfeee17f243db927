"""Honest rounding passes the check of a candidate's result, and nothing that is wrong in one place does.

Run: pytest tests/sparse/kernels/test_measuring.py
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slope_dist.sparse.kernels import measuring

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TERMS = 512


def drawn(tokens: int, rows: int, dtype: torch.dtype, spread: int = 0) -> tuple[Tensor, Tensor]:
    """X [T, I] and W [O, I] of numbers of a dtype, in fp32; the scales of their rows go over 2^-spread ... 2^spread."""
    generator = torch.Generator().manual_seed(tokens + rows)
    made = []
    for count in (tokens, rows):
        scales = 2.0 ** torch.linspace(-spread, spread, count)[torch.randperm(count, generator=generator)]
        made.append((torch.randn(count, TERMS, generator=generator) * scales[:, None]).to(dtype).float())
    return made[0], made[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0, 3], ids=["alike", "of 64 scales"])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 16384), (2, 8192), (16, 4096), (2048, 1024), (513, 16)])
def test_honest_rounding_passes(tokens: int, rows: int, spread: int, dtype: torch.dtype) -> None:
    """In one pass or in three, and added up in another order than the reference."""
    x, w = drawn(tokens, rows, dtype, spread)
    product = x @ w.t()
    halves = x[:, ::2] @ w[:, ::2].t() + x[:, 1::2] @ w[:, 1::2].t()
    assert measuring.why_wrong(halves.to(dtype), product, TERMS) is None
    # Parts of a sum that are rounded before they meet.
    parts = (x[:, ::2] @ w[:, ::2].t()).to(dtype) + (x[:, 1::2] @ w[:, 1::2].t()).to(dtype)
    assert measuring.why_wrong(parts, product, TERMS) is None
    bias, addend = product[0].to(dtype), product.flip(0).to(dtype)
    for result in ((halves + addend.float() + bias.float()).to(dtype), halves.to(dtype) + addend + bias):
        assert measuring.why_wrong(result, product, TERMS, bias=bias, addend=addend) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_honest_rounding_of_tiny_numbers_passes(dtype: torch.dtype) -> None:
    """fp16 has steps of 2^-24 there, whatever the size."""
    x, w = drawn(64, 128, dtype)
    product = 2**-22 * (x @ w.t())
    assert measuring.why_wrong(product.to(dtype), product, TERMS) is None


def zeroed(*place: slice | int) -> Callable[[Tensor], None]:
    def damage(y: Tensor) -> None:
        y[place] = 0

    return damage


def off_in_one_place(y: Tensor) -> None:
    place = y.abs().argmax()
    y.view(-1)[place] *= 1.06


def swapped_rows(y: Tensor) -> None:
    y[[0, 1]] = y[[1, 0]]


def nan_in_one_place(y: Tensor) -> None:
    y[-1, -1] = torch.nan


def drifting_column(y: Tensor) -> None:
    y[:, 7] *= 1.02


def drifting_row(y: Tensor) -> None:
    y[7] *= 1.02


DAMAGES: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "a fragment": (zeroed(slice(96, 112), slice(8, 16)), "in (row|element|column) "),
    "the last token": (zeroed(-1), ""),
    "a column": (zeroed(slice(None), 7), ""),
    "an element": (off_in_one_place, "in element "),
    "a column that is 2 % off": (drifting_column, "in column 7"),
    "a row that is 2 % off": (drifting_row, "in row 7"),
    "two rows in each other's place": (swapped_rows, ""),
    "NaN": (nan_in_one_place, "by nan"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_one_place_is_found(damage: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several parts, the last one shorter.
    monkeypatch.setattr(measuring, "CHUNK", 300 * 1024)
    spoil, where = DAMAGES[damage]
    x, w = drawn(2048, 1024, dtype)
    product = x @ w.t()
    y = product.clone().to(dtype)
    assert measuring.why_wrong(y, product, TERMS) is None
    spoil(y)
    reason = measuring.why_wrong(y, product, TERMS)
    assert reason is not None and reason.startswith("wrong: off the reference by ")
    # The other dtypes are bounded so closely that the whole tells of some.
    assert dtype != torch.bfloat16 or re.search(where, reason), reason


def test_what_is_off_as_a_whole_is_said_to_be() -> None:
    x, w = drawn(16, 64, torch.bfloat16)
    product = x @ w.t()
    assert measuring.why_wrong((1.05 * product).bfloat16(), product, TERMS) == "wrong: off the reference by 5.0e-02"
    bias = torch.randn(64).bfloat16()
    assert measuring.why_wrong(product.bfloat16(), product, TERMS, bias=bias) is not None
