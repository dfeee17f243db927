"""The CUTLASS route gives its kernels what they read, where it lies, and says in words what they cannot compute.

The kernel is a stand-in that reads metadata in CUTLASS's order; what a card makes of the same is not shown here.

Run: pytest tests/sparse/kernels/test_cutlass_route.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import CompressedMatrix, Pattern, reference
from slope_dist.sparse.kernels.cutlass import route
from slope_dist.sparse.kernels.problem import Problem
from slope_dist.sparse.kernels.vendor import VendorError
from tests.sparse.kernels.cutlass_stand_in import REFUSED, cutlass_of

pytestmark = pytest.mark.usefixtures("nan_scratch")

ARCHITECTURES = ["sm_80", "sm_90a"]
DTYPES = [torch.float16, torch.bfloat16]
ROWS, COLUMNS = 192, 128


def problem(rows: int = ROWS, columns: int = COLUMNS, tokens: int = 5, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem(tokens, rows, columns, dtype, torch.device("cpu"))


def operands(dtype: torch.dtype, tokens: int = 5) -> dict[str, Any]:
    matrix = CompressedMatrix.prune(torch.randn(ROWS, COLUMNS).to(dtype), Pattern(2, 4))
    x, bias, addend = torch.randn(tokens, COLUMNS), torch.randn(ROWS), torch.randn(tokens, ROWS)
    parts = {"x": x, "bias": bias, "addend": addend}
    return {"values": matrix.values, "indices": matrix.indices} | {name: part.to(dtype) for name, part in parts.items()}


def expected(parts: dict[str, Any], *, bias: bool = True, addend: bool = True) -> Tensor:
    y = reference.forward(parts["x"].float(), parts["values"].float(), parts["indices"], Pattern(2, 4))
    return (y + bool(bias) * parts["bias"].float() + bool(addend) * parts["addend"].float()).to(parts["x"].dtype)


def elsewhere(part: Tensor, how: str) -> Tensor:
    """The same numbers, not on a multiple of 16 bytes, or with gaps between the rows."""
    if how == "shifted":
        buffer = part.new_empty(part.numel() + 1)
        return buffer[1:].view(part.shape).copy_(part)
    buffer = part.new_empty(*part.shape[:-1], 2 * part.shape[-1])
    return buffer[..., : part.shape[-1]].copy_(part) if part.dim() > 1 else buffer[::2].copy_(part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("addend", [False, True], ids=["", "addend"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("given", [False, True], ids=["derived", "given"])
def test_product(
    monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype, given: bool, bias: bool, addend: bool
) -> None:
    cutlass, opened = cutlass_of(architecture, monkeypatch)
    parts = operands(dtype)
    metadata = cutlass.metadata_layout(ROWS, COLUMNS, dtype).vendor(parts["indices"]) if given else None
    optional = {name: parts[name] for name, used in (("bias", bias), ("addend", addend)) if used}
    before = {name: part.clone() for name, part in parts.items()}
    algorithms = cutlass.algorithms(problem(dtype=dtype))
    for algorithm in algorithms:
        assert algorithm.deterministic
        y = cutlass.product(parts["x"], parts["values"], parts["indices"], metadata, algorithm, **optional)
        assert y.is_contiguous() and y.equal(expected(parts, bias=bias, addend=addend))
    # Each algorithm is a library of its own, called once.
    assert [len(library.calls) for library in opened] == [1] * len(algorithms)
    assert all(parts[name].equal(part) for name, part in before.items())


def test_operands_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    cutlass, opened = cutlass_of("sm_90a", monkeypatch)
    parts = operands(torch.float16)
    metadata = cutlass.metadata_layout(ROWS, COLUMNS, torch.float16).vendor(parts["indices"])
    parts |= {"metadata": metadata, "algorithm": cutlass.algorithms(problem())[0]}
    y = cutlass.product(**parts)
    names = ("values", "metadata", "x", "bias", "addend")
    assert opened[0].calls[0] == (*(parts[name].data_ptr() for name in names), y.data_ptr(), 0, 0, 0)


@pytest.mark.parametrize("how", ["shifted", "gaps"])
@pytest.mark.parametrize("name", ["x", "values", "bias", "addend", "metadata"])
def test_operands_that_lie_badly_are_copied(monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    cutlass, _ = cutlass_of("sm_80", monkeypatch)
    parts = operands(torch.bfloat16)
    right = expected(parts)
    parts["metadata"] = cutlass.metadata_layout(ROWS, COLUMNS, torch.bfloat16).vendor(parts["indices"])
    parts[name] = elsewhere(parts[name], how)
    assert cutlass.product(**parts, algorithm=cutlass.algorithms(problem())[-1]).equal(right)


def test_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    cutlass, opened = cutlass_of("sm_90a", monkeypatch)
    parts = operands(torch.float16, tokens=0)
    y = cutlass.product(**parts, metadata=None, algorithm=cutlass.algorithms(problem())[0])
    assert y.shape == (0, ROWS) and not any(library.calls for library in opened)


def test_a_refusal_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cutlass, opened = cutlass_of("sm_90a", monkeypatch)
    parts = operands(torch.float16)
    assert cutlass.unsupported(problem()) is None
    for library in opened:
        library.code = REFUSED
    with pytest.raises(VendorError, match=r"CUTLASS 128x256 refuses 192 x 128, 5 tokens: reason 7"):
        cutlass.product(**parts, metadata=None, algorithm=cutlass.algorithms(problem())[0])


@pytest.mark.parametrize(
    ("architecture", "change", "reason"),
    [
        ("sm_80", {"rows": 48}, "multiple of 32 rows and 64 columns, not 48 x 128"),
        ("sm_80", {"columns": 96}, "multiple of 32 rows and 64 columns, not 192 x 96"),
        ("sm_90a", {"rows": 96}, "multiple of 64 rows and 64 columns, not 96 x 128"),
        ("sm_90a", {"columns": 32}, "multiple of 64 rows and 64 columns, not 192 x 32"),
        ("sm_90a", {"dtype": torch.float32}, "not for float32"),
        ("sm_90a", {"tokens": 2**25}, "up to 2147483647 elements, not 6442450944"),
        ("sm_80", {"rows": 2**16, "columns": 2**15}, "up to 2147483647 elements, not 2147483648"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_what_is_unsupported_is_said_and_not_compiled_for(
    monkeypatch: pytest.MonkeyPatch, architecture: str, change: dict[str, Any], reason: str
) -> None:
    cutlass, opened = cutlass_of(architecture, monkeypatch)
    assert reason in str(cutlass.unsupported(problem(**change)))
    assert opened == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_least_supported_sizes(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    cutlass, _ = cutlass_of(architecture, monkeypatch)
    rows, columns = route.MULTIPLES[architecture]
    assert cutlass.unsupported(problem(rows=rows, columns=columns, tokens=1)) is None


def test_each_element_type_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cutlass, opened = cutlass_of("sm_80", monkeypatch)
    tiles = len(cutlass.algorithms(problem()))
    assert opened == []
    for _ in range(2):
        for count, dtype in enumerate(DTYPES, start=1):
            assert cutlass.unsupported(problem(dtype=dtype)) is None
            assert len(opened) >= count * tiles
    assert len(opened) == len(DTYPES) * tiles


def test_kernels_that_do_not_compile_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cutlass, _ = cutlass_of("sm_80", monkeypatch)
    attempts = []

    def fails(*arguments: Any) -> None:
        attempts.append(arguments)
        raise VendorError("CUTLASS does not compile: too old")

    monkeypatch.setattr(route, "open_library", fails)
    assert cutlass.unsupported(problem()) == "CUTLASS does not compile: too old"
    tried = len(attempts)
    assert cutlass.unsupported(problem()) == "CUTLASS does not compile: too old" and len(attempts) == tried
    with pytest.raises(VendorError, match="too old"):
        cutlass.product(**operands(torch.float16), metadata=None, algorithm=cutlass.algorithms(problem())[0])


def test_other_cards_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(VendorError, match="kernels for sm_80 and sm_90a, not for sm_89"):
        route.CutlassRoute(torch.device("cuda", 0))


def test_it_says_that_it_has_not_run() -> None:
    assert route.CutlassRoute.standing == "compiled, not yet run on a card"
