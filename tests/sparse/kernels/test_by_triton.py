"""A layer's step, with and without gradients, whose every step but the product of dense matrices is a Triton kernel.

Run: pytest tests/sparse/kernels/test_by_triton.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse import codec, kernels
from slope_dist.sparse.kernels import primitives
from slope_dist.sparse.kernels.candidates import Operands
from tests.sparse.kernels.test_dispatch import CPU, check_product, operands
from tests.sparse.kernels.test_products import IN, dispatcher, layer, step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kernels that were asked for."""
    from slope_dist.sparse.kernels import jit

    names: set[str] = set()
    launch = jit.launch

    def spy(kernel: object, *args: object, **constants: object) -> None:
        names.add(kernel.fn.__name__)  # type: ignore[attr-defined]
        launch(kernel, *args, **constants)

    for name in ("expand", "gather", "transpose"):
        monkeypatch.setattr(f"slope_dist.sparse.kernels.jit.{name}.launch", spy)
    return names


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("route", ["expand", "transpose"])
def test_outputs_and_all_gradients(route: str, resident: bool, seen: set[str]) -> None:
    assert primitives.why_no_triton("cpu") is None
    made = layer(resident=resident)
    expected = step(made)
    made.weight.values_changed()  # type: ignore[attr-defined]
    with kernels.using(dispatcher(route)):
        found = step(made)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert {"_gather", "_expand"} <= seen
    assert ("_transpose" in seen) == (resident or route == "transpose")


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_decoding(tokens: int, adapter: bool) -> None:
    made = layer(adapter=adapter)
    x = torch.randn(tokens, IN)
    with torch.inference_mode():
        expected = made(x)
        chosen = dispatcher("decode")
        with kernels.using(chosen):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
        assert [entry["label"] for entry in chosen.as_data().values()] == ["decode"]


def test_up_to_32_tokens_may_be_decoded() -> None:
    chosen = dispatcher("decode")
    check_product(chosen, kernels.Problem(3, 64, 32, torch.float32, CPU))
    assert chosen.product_choice(kernels.Problem(4, 64, 32, torch.float32, CPU)).route == "decode"
    assert "decode" not in chosen.product_choice(kernels.Problem(33, 64, 32, torch.float32, CPU)).seconds


@pytest.mark.parametrize("route", ["decode", "expand", "plain"])
def test_an_adapter_joins_any_route(route: str) -> None:
    chosen, given = dispatcher(route), operands(kernels.Problem(2, 64, 32, torch.float32, CPU))
    down, up, bias = torch.randn(8, 32), torch.randn(64, 8), torch.randn(64)
    y = chosen.product_with_adapter(Operands(given.x, given.values, given.indices, bias=bias), down, up, 0.125)
    dense = codec.expand(given.values, given.indices, primitives.TWO_FOUR) + 0.125 * up @ down
    torch.testing.assert_close(y, given.x @ dense.t() + bias, rtol=1e-4, atol=1e-4)
