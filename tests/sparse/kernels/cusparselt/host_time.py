"""Host time of a cached cuSPARSELt product: the binding's own, the library's being a stand-in that computes nothing.

No test: times depend on the machine. On a card the library's own time, the look-up of the stream and CUDA's allocator
come on top (`tools/benchmark.py block` has a column of it).

Run: python -m tests.sparse.kernels.cusparselt.host_time
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slope_dist.sparse import kernels
from slope_dist.sparse.kernels.cusparselt import Algorithm
from tests.sparse.kernels.cusparselt.conftest import StandIn, compile_standin
from tests.sparse.kernels.cusparselt.operands import Operands
from tests.sparse.kernels.vendors import preferring, vendors

CALLS = 3000
SIZE = 64


def microseconds(call: Callable[[], object]) -> float:
    """Median of many calls."""
    taken = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6


def main() -> None:
    """Print a line for each way in which an operand may lie."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        standin = StandIn(compile_standin(Path(folder)))
        standin.reset()
        route = standin.route()
        o = Operands(SIZE, SIZE, SIZE, torch.bfloat16)
        layout = route.metadata_layout(SIZE, SIZE, torch.bfloat16)
        assert layout is not None
        values, metadata = o.in_place(layout)
        apart = layout.vendor(o.indices)
        dispatcher = kernels.Dispatcher(device, vendors(route), arrangement="in place", timer=preferring("cuSPARSELt"))
        choice = dispatcher.product_choice(kernels.Problem(SIZE, SIZE, SIZE, torch.bfloat16, device))
        assert choice.vendor == route.name
        standin.set(no_product=1)
        ways: dict[str, Callable[[], object]] = {
            "in place": lambda: route.product(o.x, values, o.indices, metadata, Algorithm(0)),
            "in place, bias and addend": lambda: route.product(
                o.x, values, o.indices, metadata, Algorithm(0), bias=o.bias, addend=o.addend
            ),
            "kept": lambda: route.product(o.x, o.values, o.indices, apart, Algorithm(0)),
            "derived": lambda: route.product(o.x, o.values, o.indices, None, Algorithm(0)),
            "in place, through operator and dispatcher": lambda: torch.ops.slope_dist.product(
                o.x, values, o.indices, choice.candidate.form, metadata, None, None
            ),
        }
        with kernels.using(dispatcher):
            for name, call in ways.items():
                standin.forget_calls()
                call()
                print(f"{name:42} {microseconds(call):6.1f} us")


if __name__ == "__main__":
    main()
