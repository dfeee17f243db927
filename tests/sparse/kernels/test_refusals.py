"""What a library refuses in a run, though it was chosen for a number of tokens that stands for this one, is expanded.

Run: pytest tests/sparse/kernels/test_refusals.py
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import codec
from slope_dist.sparse.kernels import dispatch, primitives
from slope_dist.sparse.kernels.dispatch import Dispatcher
from slope_dist.sparse.kernels.vendor import VendorError
from tests.sparse.kernels.test_dispatch import CPU, PROBLEM, check_product, operands
from tests.sparse.kernels.vendors import PlainAlgorithm, PlainVendor, preferring, vendors

pytestmark = pytest.mark.usefixtures("plain_primitives")
FEW = replace(PROBLEM, tokens=9)


def choosy(vendor: PlainVendor | None = None, **options: bool) -> Dispatcher:
    """Its choice for 16 tokens, which stands for 9 of them too, is not taken by the library for those."""
    vendor = vendor or PlainVendor((PlainAlgorithm("choosy"),))
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=preferring("choosy"), **options)
    assert dispatcher.product_choice(PROBLEM).algorithm == "choosy"
    return dispatcher


def test_it_is_told_once_and_expanded_from_then_on() -> None:
    dispatcher = choosy()
    with pytest.warns(RuntimeWarning, match=r"^plain/1 choosy refuses product .*, which is expanded .*: 9 tokens$"):
        check_product(dispatcher, FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_product(dispatcher, FEW)
        # Nor is it asked for other numbers that the same one stands for; that one itself it takes.
        check_product(dispatcher, replace(PROBLEM, tokens=10))
        check_product(dispatcher, PROBLEM)
    assert dispatcher._candidate("product", operands(PROBLEM)).algorithm == "choosy"


def test_a_number_of_tokens_with_a_choice_of_its_own_keeps_it() -> None:
    dispatcher, own = choosy(), replace(PROBLEM, tokens=12)
    dispatcher._choices["product", own] = dispatcher.product_choice(replace(PROBLEM, tokens=32))
    with pytest.warns(RuntimeWarning, match="9 tokens"):
        check_product(dispatcher, FEW)
    assert dispatcher._candidate("product", operands(own)).algorithm == "choosy"


def test_the_products_with_adapters_are_expanded_too() -> None:
    given, down, up = operands(FEW), torch.randn(4, 32), torch.randn(64, 4)
    with pytest.warns(RuntimeWarning, match="plain/1 choosy refuses"):
        found = choosy().product_with_adapter(given, down, up, 0.5)
    weight = codec.expand(given.values, given.indices, primitives.TWO_FOUR) + 0.5 * up @ down
    torch.testing.assert_close(found, given.x @ weight.t(), rtol=1e-4, atol=1e-4)


class Failing(PlainVendor):
    """Fails once it has been chosen, as long as `error` says so."""

    error: Exception | None = None

    def product(self, *operands: Tensor, **options: Tensor) -> Tensor:  # type: ignore[override]
        if self.error is not None:
            raise self.error
        return super().product(*operands, **options)  # type: ignore[arg-type]


def failing() -> tuple[Failing, Dispatcher]:
    vendor = Failing((PlainAlgorithm("choosy"),))
    return vendor, choosy(vendor)


def test_what_found_no_memory_is_asked_again_the_next_time() -> None:
    vendor, dispatcher = failing()
    vendor.error = VendorError("plain returned CUSPARSE_STATUS_ALLOC_FAILED")
    with pytest.warns(RuntimeWarning, match="which is expanded this time: no memory: plain returned"):
        check_product(dispatcher, PROBLEM)
    assert dispatcher._candidate("product", operands(PROBLEM)).algorithm == "choosy"


def test_a_refusal_of_what_was_measured_is_not_asked_for_again() -> None:
    vendor, dispatcher = failing()
    vendor.error = VendorError("plain refuses")
    with pytest.warns(RuntimeWarning, match="plain refuses"):
        check_product(dispatcher, PROBLEM)
    assert dispatcher._candidate("product", operands(PROBLEM)).route == "expand"


def test_in_a_deterministic_run_it_is_an_error() -> None:
    with pytest.raises(VendorError, match="9 tokens"):
        check_product(choosy(deterministic=True), FEW)


@pytest.mark.parametrize("when", ["_capturing", "breaks_device"])
def test_while_a_graph_is_captured_or_on_a_broken_device_it_is_an_error(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendor, dispatcher = failing()
    check_product(dispatcher, PROBLEM)
    vendor.error = VendorError("plain refuses")
    monkeypatch.setattr(dispatch, when, lambda *_: True)
    with pytest.raises(VendorError, match="plain refuses"):
        check_product(dispatcher, PROBLEM)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_other_errors_are_not_taken_for_refusals(error: Exception) -> None:
    vendor, dispatcher = failing()
    vendor.error = error
    with pytest.raises(type(error), match=str(error)):
        check_product(dispatcher, PROBLEM)
