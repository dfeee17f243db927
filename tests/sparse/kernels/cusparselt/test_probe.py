"""The operand's order is learned exactly, whatever permutation it is, and anything else is told and never relied on.

Run: pytest tests/sparse/kernels/cusparselt/test_probe.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.sparse import codec
from slope_dist.sparse.kernels.cusparselt.plan import Compressor
from tests.sparse.kernels.cusparselt.conftest import StandIn
from tests.sparse.kernels.cusparselt.operands import TWO_FOUR, Operands

pytestmark = pytest.mark.usefixtures("nan_scratch")

SHAPES = [(16, 16), (16, 48), (64, 32), (80, 144)]
SCRAMBLED_BLOCKS, LINEAR, SCRAMBLED_WHOLE, OTHER_CODES, TWICE, PADDED = range(6)
METADATA_FIRST, VALUES_BY_COLUMN = 1, 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("metadata", "rows_of_block"),
    [(SCRAMBLED_BLOCKS, 16), (LINEAR, 1), (SCRAMBLED_WHOLE, None)],
    ids=["scrambled blocks", "linear", "scrambled whole"],
)
def test_what_is_made_by_the_learned_layout_is_what_the_library_makes(
    standin: StandIn, shape: tuple[int, int], metadata: int, rows_of_block: int | None, dtype: torch.dtype
) -> None:
    standin.set(metadata=metadata)
    route = standin.route()
    layout = route.metadata_layout(*shape, dtype)
    assert layout is not None and route.why_recompressed(*shape, dtype) is None
    assert layout.source.numel() == (rows_of_block or shape[0]) * shape[1] // 4
    operands = Operands(8, *shape, dtype)
    operand = Compressor(route._handle, *shape, dtype)(codec.expand(operands.values, operands.indices, TWO_FOUR))
    made = torch.cat([operands.values.view(torch.uint8).view(-1), layout.vendor(operands.indices)])
    assert operand.equal(made)
    assert layout.ours(operand[operands.values.nbytes :], shape).equal(operands.indices)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"values": METADATA_FIRST}, "does not begin with the kept entries"),
        ({"values": VALUES_BY_COLUMN}, "does not begin with the kept entries"),
        ({"metadata": OTHER_CODES}, "other codes"),
        ({"metadata": TWICE}, "no permutation"),
        ({"metadata": PADDED}, "bytes instead of"),
    ],
    ids=["metadata first", "values by column", "other codes", "one place for two groups", "padded"],
)
def test_another_order_is_told_and_there_is_no_layout(standin: StandIn, setting: dict[str, int], reason: str) -> None:
    standin.set(**setting)
    route = standin.route()
    assert route.metadata_layout(32, 48, torch.bfloat16) is None
    said = route.why_recompressed(32, 48, torch.bfloat16)
    assert said and reason in said and "\n" not in said


def test_a_layout_is_learned_once_for_each_shape_and_dtype(standin: StandIn) -> None:
    route = standin.route()
    for _ in range(2):
        for shape in ((16, 32), (32, 16)):
            for dtype in (torch.bfloat16, torch.float16):
                route.metadata_layout(*shape, dtype)
    assert standin.names.count("SpMMACompressedSize2") == 4


def test_numbering_groups_takes_few_compressions(standin: StandIn) -> None:
    standin.route().metadata_layout(96, 96, torch.bfloat16)
    # 2,304 groups: five digits in base six; 4,608 kept entries: two passes of 251; two checks.
    assert standin.names.count("SpMMACompress2") == 5 + 2 + 2
