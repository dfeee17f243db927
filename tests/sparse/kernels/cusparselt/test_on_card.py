"""The order of the real library's operand is learned, values may be overwritten in it, and nothing is compressed again.

With a GPU the subject is the installed cuSPARSELt, one test a shape, so that a failure says which and why; on a CPU the
stand-in, which shows that the bodies are right and nothing of a card.

Run: pytest tests/sparse/kernels/cusparselt/test_on_card.py -rs
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse import codec
from slope_dist.sparse.kernels import Problem, measuring, primitives
from slope_dist.sparse.kernels.cusparselt import CusparseltRoute
from slope_dist.sparse.kernels.cusparselt.plan import Compressor
from slope_dist.sparse.kernels.primitives import TWO_FOUR
from slope_dist.sparse.kernels.vendor import VendorError
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.kernels.found import device_of, found_on

pytestmark = pytest.mark.usefixtures("nan_scratch")

SMALL = ((16, 16), (64, 64), (80, 144), (272, 48))
MODELS = ((4096, 4096), (14336, 4096), (5120, 20480), (36864, 9216))
"""A square, LLaMA-3-8B's gate, OPT-13B's second, OPT-66B's first feed-forward weight."""

SHAPES = [
    pytest.param(*device.values, shape, marks=device.marks, id=f"{device.values[0]}-{shape[0]}x{shape[1]}")
    for device in DEVICES
    for shape in (SMALL + MODELS if device.values[0] == "cuda" else SMALL)
]
DTYPES = [torch.bfloat16, torch.float16]


def route_on(device: str) -> CusparseltRoute:
    found = found_on(device)
    assert "cusparselt" not in found.missing, found.missing
    route = found.routes[0]
    assert isinstance(route, CusparseltRoute)
    return route


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "shape"), SHAPES)
def test_the_order_is_learned_and_is_the_compressors(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    route = route_on(device)
    why = route.why_recompressed(*shape, dtype)
    assert why is None, f"cuSPARSELt {route.version}, {shape}, {dtype}: compressed for each product, because {why}"
    layout = route.metadata_layout(*shape, dtype)
    assert layout is not None
    values, indices = primitives.random_matrix(*shape, dtype, device_of(device))
    # No zeros: of those the compressor would choose the positions.
    values[values == 0] = 1
    operand = Compressor(route._handle, *shape, dtype)(codec.expand(values, indices, TWO_FOUR))
    assert operand[: values.nbytes].equal(values.view(torch.uint8).view(-1))
    assert operand[values.nbytes :].equal(layout.vendor(indices))
    assert layout.ours(operand[values.nbytes :], shape).equal(indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "shape"), SHAPES)
def test_values_overwritten_where_they_lie_are_the_next_products(
    device: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every algorithm that is right at first; kept zeros keep their places."""
    route, tokens = route_on(device), 64
    rows, columns = shape
    layout = route.metadata_layout(rows, columns, dtype)
    assert layout is not None, route.why_recompressed(rows, columns, dtype)
    drawn, indices = primitives.random_matrix(rows, columns, dtype, device_of(device))
    metadata = layout.vendor(indices)
    buffer = torch.empty(drawn.nbytes + metadata.nbytes, dtype=torch.uint8, device=drawn.device)
    values, tail = buffer[: drawn.nbytes].view(dtype).view(drawn.shape), buffer[drawn.nbytes :]
    tail.copy_(metadata)
    monkeypatch.setattr(route, "_staged", lambda *_: pytest.fail("the operand was not used where it lies"))
    x = torch.randn(tokens, columns).to(drawn)
    right: dict[object, str | None] = {}
    for number, fresh in enumerate((drawn, torch.zeros_like(drawn), -0.5 * drawn.flip(0))):
        values.copy_(fresh)
        expected = x.float() @ codec.expand(fresh, indices, TWO_FOUR).float().t()
        for algorithm in route.algorithms(Problem(tokens, rows, columns, dtype, drawn.device)):
            if right.get(algorithm) is not None:
                continue
            try:
                why = measuring.why_wrong(route.product(x, values, indices, tail, algorithm), expected, columns)
            except VendorError as error:
                why = str(error)
            if number == 0:
                right[algorithm] = why
            else:
                assert why is None, f"cuSPARSELt {route.version}, algorithm {algorithm}, overwritten values: {why}"
    assert any(why is None for why in right.values()), right
