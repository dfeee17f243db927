"""Every way to compute a product gives what plain torch gives in fp64, or is rejected by name.

On a GPU the ways are those of the libraries and kernels that are there, with every algorithm that they offer; on a CPU
the stand-in for cuSPARSELt and Triton's interpreter. Scratch memory is full of NaN. An algorithm of a library that is
wrong or refuses fails no test as long as the dispatcher rejects exactly it: pytest's summary of warnings names it.

Run: pytest tests/sparse/kernels/test_routes.py -rs
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slope_dist.sparse.kernels import Dispatcher, Problem, Vendors
from slope_dist.sparse.kernels.cusparselt import CusparseltRoute
from slope_dist.sparse.kernels.dispatch import Arrangement
from slope_dist.sparse.kernels.judging import OTHER_BITS
from tests.sparse.kernels.cusparselt.conftest import StandIn, build_standin
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.kernels.found import (
    VENDORS,
    device_of,
    found_on,
    in_order,
    leave_out_interpreter,
    need,
    operands_of,
    tell_rejected,
    wrong_ones,
)
from tests.sparse.kernels.vendors import preferring

pytestmark = pytest.mark.usefixtures("nan_scratch")

ARRANGEMENTS = ("in place", "kept", "derived")
SMALL = ((64, 64), (80, 144), (192, 64))
LARGE = ((512, 256), (1040, 528), (1536, 512), (832, 1984))
"""Of more than one tile of any kernel, most with an odd rest; some may be cut into square tiles."""

SHAPES = [
    pytest.param(*device.values, shape, marks=device.marks, id=f"{device.values[0]}-{shape[0]}x{shape[1]}")
    for device in DEVICES
    for shape in (SMALL + LARGE if device.values[0] == "cuda" else SMALL)
]

TOKENS = {1: (1,), 8: (8, 5), 32: (32, 17), 128: (128, 77)}
"""Numbers that are measured, and those to which the choice applies too."""

MANY_TOKENS = {1024: (1024, 777)}

EXTRAS = ((False, False), (True, False), (False, True), (True, True))


HALVES = [torch.float16 if torch.cuda.is_available() else pytest.param(torch.float16, marks=pytest.mark.slow)]
HALVES += [torch.bfloat16]
"""Under the interpreter each takes its quarter of a minute."""


def tokens_on(device: str) -> dict[int, tuple[int, ...]]:
    return TOKENS | (MANY_TOKENS if device == "cuda" else {})


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("device", "shape"), SHAPES)
def test_products(
    device: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    arrangement: Arrangement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == torch.bfloat16:
        leave_out_interpreter(monkeypatch, device)
    vendors = found_on(device)
    dispatcher = Dispatcher(device_of(device), vendors, arrangement=arrangement, timer=in_order)
    for measured, used in tokens_on(device).items():
        problem = Problem(measured, *shape, dtype, device_of(device))
        ways = dispatcher.candidates("product", problem)
        choice = dispatcher.product_choice(problem)
        assert choice.seconds.keys() | choice.rejected.keys() == {way.label for way in ways}
        fastest: dict[str, str] = {}
        for way in sorted((way for way in ways if way.label in choice.seconds), key=lambda w: choice.seconds[w.label]):
            fastest.setdefault(way.form, way.label)
        # Also for fewer tokens, at which the dispatcher does not look.
        for tokens in used:
            for bias, addend in EXTRAS if tokens == measured else EXTRAS[-1:]:
                asked = Problem(tokens, *shape, dtype, device_of(device))
                wrong = wrong_ones(dispatcher, ways, *operands_of("product", asked, bias=bias, addend=addend))
                taken = {label: why for label, why in wrong.items() if label in fastest.values()}
                assert not taken, f"{asked}, bias {bias}, addend {addend}: taken, but wrong: {taken}"
                if (tokens, bias, addend) == (measured, False, False):
                    # One may be right until something is to be added, and have other bits at some times alone.
                    alone = {label for label, why in choice.rejected.items() if not why.startswith("with ")}
                    seen, left_out = (
                        {label for label in labels if OTHER_BITS not in (wrong.get(label), choice.rejected.get(label))}
                        for labels in (wrong, alone)
                    )
                    assert left_out <= seen <= choice.rejected.keys(), f"{asked}: {wrong}; {choice.rejected}"
        tell_rejected(vendors, "product", problem, choice)


@pytest.mark.parametrize("over", ["expand", *(f"{vendor}/{tiles}" for vendor in VENDORS for tiles in (1, 3))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_input_gradients(device: str, dtype: torch.dtype, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From W^R alone: W^{R,C} expanded, or its transpose made and multiplied by a library, whole or in tiles."""
    leave_out_interpreter(monkeypatch, device)
    vendors = need(device, over)
    dispatcher = Dispatcher(device_of(device), vendors, timer=preferring(over))
    for tokens in (8, 1024 if device == "cuda" else 32):
        # Wide, so that the transpose may be cut into tiles.
        problem = Problem(tokens, 64, 192, dtype, device_of(device))
        ways = dispatcher.candidates("input gradient", problem)
        choice = dispatcher.input_gradient_choice(problem)
        through_transpose = [way.label for way in ways if way.label.startswith(f"transpose, {over}")]
        product = dispatcher.product_choice(problem.transposed())
        assert bool(through_transpose) == (over != "expand" and any(over in label for label in product.seconds))
        for held in (False, True):
            wrong = wrong_ones(dispatcher, ways, *operands_of("input gradient", problem, held=held))
            assert wrong.keys() == choice.rejected.keys(), f"{problem}: {wrong}; rejected: {choice.rejected}"
        tell_rejected(vendors, "input gradient", problem, choice)


@pytest.mark.parametrize("device", DEVICES)
def test_cusparselt_is_there_and_offers_something_for_every_small_shape(device: str) -> None:
    """Torch for CUDA brings the library; that it is missing would leave the other tests without a subject."""
    vendors = found_on(device)
    assert VENDORS[0] in vendors.versions, vendors.missing
    for shape in SMALL:
        problem = Problem(128, *shape, torch.bfloat16, device_of(device))
        choice = Dispatcher(device_of(device), vendors, timer=in_order).product_choice(problem)
        assert any(label.startswith(VENDORS[0]) for label in choice.seconds), choice.rejected


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in computes on host memory")
def test_wrong_and_refusing_algorithms_are_rejected_by_name(tmp_path: Path) -> None:
    # A library of its own: the settings are global in it.
    library = StandIn(build_standin(tmp_path))
    library.reset()
    library.set(wrong_algorithm=1, failing_algorithm=2)
    vendors = Vendors((CusparseltRoute(device_of("cpu"), library.path),))
    dispatcher = Dispatcher(device_of("cpu"), vendors, timer=in_order)
    # More than are decoded.
    problem = Problem(40, 64, 64, torch.bfloat16, device_of("cpu"))
    choice = dispatcher.product_choice(problem)
    assert choice.rejected.keys() == {"cuSPARSELt/1 1", "cuSPARSELt/1 2"}
    wrong = wrong_ones(dispatcher, dispatcher.candidates("product", problem), *operands_of("product", problem))
    assert wrong.keys() == choice.rejected.keys()
    with pytest.warns(UserWarning, match=r"rejected: cuSPARSELt/1 1: wrong.*cuSPARSELt/1 2: .*NOT_SUPPORTED"):
        tell_rejected(vendors, "product", problem, choice)
