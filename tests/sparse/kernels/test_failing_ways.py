"""A way that fails while it is tried is left out by name: for now, for good, or with the end of its process.

Run: pytest tests/sparse/kernels/test_failing_ways.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slope_dist.errors import UnfinishedError
from slope_dist.sparse import kernels
from slope_dist.sparse.kernels.dispatch import Dispatcher
from slope_dist.sparse.kernels.vendor import VendorError
from tests.sparse.kernels.test_dispatch import CPU, PROBLEM, SQUARE, check_product, never
from tests.sparse.kernels.vendors import PlainAlgorithm, PlainVendor, preferring, vendors

pytestmark = pytest.mark.usefixtures("plain_primitives")


class BrokenVendor(PlainVendor):
    """Its product fails as a compiler, a driver or an allocator would: not by the contract's own error."""

    error: Exception = RuntimeError("no such instruction\nin line 3")

    def product(self, *args: object, **options: object) -> torch.Tensor:
        raise self.error


def test_a_way_that_fails_in_a_way_of_its_own_is_rejected_by_name() -> None:
    choice = Dispatcher(CPU, vendors(BrokenVendor()), timer=preferring("plain")).product_choice(SQUARE)
    assert choice.route == "expand"
    assert choice.rejected == {"plain/1 right": "RuntimeError: no such instruction"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        VendorError("cuSPARSELt 0.8.1: cusparseLtMatmul returned CUSPARSE_STATUS_ALLOC_FAILED (no resources)"),
    ],
    ids=["allocator", "driver", "library"],
)
def test_what_found_no_memory_is_tried_again_by_the_next_process(error: Exception, tmp_path: Path) -> None:
    store, vendor = kernels.ChoiceStore(tmp_path / "kernels.json"), BrokenVendor()
    vendor.error = error
    dispatcher = Dispatcher(CPU, vendors(vendor), store, timer=preferring("plain"))
    choice = dispatcher.product_choice(SQUARE)
    assert choice.route == "expand" and choice.rejected["plain/1 right"].startswith("no memory: ")
    dispatcher._timer = never
    assert dispatcher.product_choice(SQUARE) is choice
    again = Dispatcher(CPU, vendors(PlainVendor()), store, timer=preferring("plain"))
    assert again.product_choice(SQUARE).algorithm == "right"


def test_a_library_that_found_no_memory_to_be_asked_is_asked_again_by_the_next_process(tmp_path: Path) -> None:
    class Short(PlainVendor):
        def unsupported(self, problem: kernels.Problem) -> str:
            return "no memory to learn"

    store = kernels.ChoiceStore(tmp_path / "kernels.json")
    assert Dispatcher(CPU, vendors(Short()), store, timer=preferring()).product_choice(SQUARE).route == "expand"
    again = Dispatcher(CPU, vendors(PlainVendor()), store, timer=preferring("plain"))
    assert again.product_choice(SQUARE).algorithm == "right"


def test_a_deterministic_run_keeps_its_choices_whatever_memory_there_was(tmp_path: Path) -> None:
    store, vendor = kernels.ChoiceStore(tmp_path / "kernels.json"), BrokenVendor()
    vendor.error = torch.OutOfMemoryError("CUDA out of memory.")
    for found, timer in ((vendor, preferring("plain")), (PlainVendor(), never)):
        dispatcher = Dispatcher(CPU, vendors(found), store, timer=timer, deterministic=True)
        assert dispatcher.product_choice(SQUARE).route == "expand"
    assert "no memory" not in store.path.read_text()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        VendorError("CUTLASS 64x64 refuses: device-side assert triggered"),
    ],
    ids=["torch", "Triton", "library"],
)
def test_a_way_that_breaks_the_device_ends_the_process_by_name_and_is_left_out_by_the_next(
    error: Exception, tmp_path: Path
) -> None:
    store, vendor = kernels.ChoiceStore(tmp_path / "kernels.json"), BrokenVendor()
    vendor.kinds = (PlainAlgorithm("first"), PlainAlgorithm("second"))
    vendor.error = error
    with pytest.raises(UnfinishedError, match=r"^plain/1 first broke cpu when it was tried for product .*next start"):
        Dispatcher(CPU, vendors(vendor), store, timer=never).product_choice(SQUARE)
    assert list(tmp_path.glob("*trying*")) == []
    right = PlainVendor((PlainAlgorithm("first"), PlainAlgorithm("right")))
    again = Dispatcher(CPU, vendors(right), kernels.ChoiceStore(store.path), timer=preferring("first", "right"))
    choice = again.product_choice(SQUARE)
    assert choice.algorithm == "right" and choice.rejected["plain/1 first"].startswith("crashed when it was tried: ")
    assert [line for line in again.report() if "plain/1 first is never tried again: it crashed when" in line]
    # Only for what it was tried for.
    assert again.product_choice(PROBLEM).algorithm == "first"


def test_without_a_store_a_way_that_breaks_the_device_is_named_too() -> None:
    vendor = BrokenVendor()
    vendor.error = RuntimeError("CUDA error: misaligned address")
    with pytest.raises(UnfinishedError, match=r"^plain/1 right broke cpu .*misaligned address$"):
        Dispatcher(CPU, vendors(vendor), timer=never).product_choice(SQUARE)


def test_each_way_of_a_library_is_marked_while_it_first_runs_and_not_when_it_is_used(tmp_path: Path) -> None:
    marked: list[tuple[str, ...]] = []

    class Watching(PlainVendor):
        def product(self, *args: object, **options: object) -> torch.Tensor:
            marks = [json.loads(mark.read_text()) for mark in tmp_path.glob("kernels.json.trying.*")]
            marked.append(tuple(mark["label"] for mark in marks))
            return super().product(*args, **options)  # type: ignore[arg-type]

    store = kernels.ChoiceStore(tmp_path / "kernels.json")
    vendor = Watching((PlainAlgorithm("first"), PlainAlgorithm("second")))
    dispatcher = Dispatcher(CPU, vendors(vendor), store, timer=preferring("plain"))
    dispatcher.product_choice(SQUARE)
    assert list(dict.fromkeys(marked)) == [("plain/1 first",), ("plain/1 second",)]
    marked.clear()
    check_product(dispatcher, SQUARE)
    assert marked == [()]
