"""A choice says in words how it compares with dense, and what failed.

Run: pytest tests/sparse/kernels/test_choice.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse import kernels
from slope_dist.sparse.kernels.dispatch import Dispatcher
from tests.sparse.kernels.vendors import PlainAlgorithm, PlainVendor, preferring, vendors

pytestmark = pytest.mark.usefixtures("plain_primitives")
CPU = torch.device("cpu")
SQUARE = kernels.Problem(16, 64, 64, torch.float32, CPU)
"""Has no tiles, which would add what an algorithm leaves out."""


def test_what_is_slower_than_dense_is_said_to_be() -> None:
    """And by how much, and why dense is no choice."""
    seconds = {"expand": 1.31, "dense": 1.0, "plain/1 right": 2.0}
    dispatcher = Dispatcher(CPU, vendors(PlainVendor()), timer=lambda *_: dict(seconds))
    assert dispatcher.product_choice(SQUARE).route == "expand"
    assert dispatcher.report()[-1].endswith(
        "1.31x the time of dense; next best: plain/1 right, 2.00x; 31 % slower than dense: no way that keeps the "
        "weight compressed is as fast, and a dense copy of it is not held (rule R1)"
    )


def test_the_report_says_what_failed() -> None:
    vendor = PlainVendor((PlainAlgorithm("failing"), PlainAlgorithm("wrong"), PlainAlgorithm("right")))
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=preferring("plain/1 right"))
    dispatcher.warm_up([("product", SQUARE)])
    assert dispatcher.report()[-1].endswith("; 2 failed, such as plain/1 failing: plain refuses: not supported")
