"""The order of the real library's operand is learned, values may be overwritten in it, and nothing is compressed again.

Small shapes may be compressed for each product instead; what comes out must be right all the same.

With a GPU the subject is the installed cuSPARSELt, one test a shape, so that a failure says which and why; on a CPU the
stand-in, which shows that the bodies are right and nothing of a card.

Run: pytest tests/sparse/kernels/cusparselt/test_on_card.py -rs
"""

from __future__ import annotations

import warnings

import pytest
import torch

from slope_dist.sparse import codec
from slope_dist.sparse.kernels import Problem, measuring, primitives
from slope_dist.sparse.kernels.cusparselt import CusparseltRoute
from slope_dist.sparse.kernels.cusparselt.plan import Compressor
from slope_dist.sparse.kernels.primitives import TWO_FOUR
from slope_dist.sparse.kernels.vendor import VendorError
from tests.sparse.kernels.cusparselt.conftest import StandIn
from tests.sparse.kernels.cusparselt.test_probe import PADDED
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.kernels.found import device_of, found_on

pytestmark = pytest.mark.usefixtures("nan_scratch")

SMALL = ((16, 16), (64, 64), (80, 144), (272, 48))
WHOLE = 64
"""Where both sides are multiples of it there is nothing that the library would pad."""

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


def may_be_recompressed(shape: tuple[int, int]) -> bool:
    """Whether the library may lay an operand out as nobody but its compressor can: it is said to pad small matrices."""
    return any(side % WHOLE for side in shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "shape"), SHAPES)
def test_the_order_is_learned_and_is_the_compressors(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    route = route_on(device)
    layout = route.metadata_layout(*shape, dtype)
    if layout is None:
        why = route.why_recompressed(*shape, dtype)
        told = f"cuSPARSELt {route.version}, {shape}, {dtype}: compressed for each product, because {why}"
        assert may_be_recompressed(shape), told
        warnings.warn(told, stacklevel=1)
        return
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
    check_overwritten(route_on(device), shape, dtype, monkeypatch)


@pytest.mark.parametrize("shape", [shape for shape in SMALL if may_be_recompressed(shape)], ids=str)
def test_what_is_padded_is_compressed_anew(
    shape: tuple[int, int], standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.set(metadata=PADDED)
    route = standin.route()
    assert route.why_recompressed(*shape, torch.bfloat16) is not None
    check_overwritten(route, shape, torch.bfloat16, monkeypatch)


def check_overwritten(
    route: CusparseltRoute, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every algorithm that is right at first; kept zeros keep their places."""
    (rows, columns), tokens, device = shape, 64, route.device
    layout = route.metadata_layout(rows, columns, dtype)
    assert layout is not None or may_be_recompressed(shape), route.why_recompressed(rows, columns, dtype)
    values, indices = primitives.random_matrix(rows, columns, dtype, device)
    tail = None
    if layout is not None:
        metadata = layout.vendor(indices)
        buffer = torch.empty(values.nbytes + metadata.nbytes, dtype=torch.uint8, device=device)
        tail = buffer[values.nbytes :]
        tail.copy_(metadata)
        drawn, values = values, buffer[: values.nbytes].view(dtype).view(values.shape)
        monkeypatch.setattr(route, "_staged", lambda *_: pytest.fail("the operand was not used where it lies"))
    else:
        drawn = values.clone()
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
