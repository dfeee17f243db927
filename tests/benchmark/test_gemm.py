"""Products are those of the shipped models, in order of importance; a right rival passes, a wrong one is not timed.

Run: pytest tests/benchmark/test_gemm.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from slope_dist.benchmark import gemm, peaks
from slope_dist.benchmark.block_linears import Matrix, block_linears, matrices
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.config import load_config
from slope_dist.errors import UserError
from slope_dist.planning import gpus
from slope_dist.sparse import reference
from slope_dist.sparse.kernels import Dispatcher, Problem, dispatch, primitives
from tests.distributed import ROOT

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SMALL = Matrix(64, 96, 1, ("tiny up",))


def shipped(*names: str) -> list:
    return [(name, load_config(ROOT / "configs" / f"{name}.json")) for name in names]


@pytest.fixture
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> Dispatcher:
    """Without Triton, whoever has turned its interpreter on, and without a clock."""
    monkeypatch.setattr(primitives, "why_no_triton", lambda device_type: "not here")

    def timer(calls: Mapping[str, Callable], device: torch.device, cold: bool) -> dict[str, float]:
        return dict.fromkeys(calls, 1.0)

    return Dispatcher(CPU, timer=timer)


def test_shapes_are_those_of_the_models_and_their_cuts() -> None:
    found = {(m.rows, m.columns): m for m in matrices(shipped("opt66b", "llama3-8b"), [1, 2, 4, 8])}
    assert {shape for shape, matrix in found.items() if matrix.ranks == 1} == {
        (9216, 9216),
        (36864, 9216),
        (9216, 36864),
        (4096, 4096),
        (1024, 4096),
        (14336, 4096),
        (4096, 14336),
    }
    # Column-split layers lose rows, row-split ones columns; what a cut makes that another model has is one weight.
    q_k_v = tuple(f"opt66b {kind}_proj, tensor 2" for kind in "qkv")
    assert found[9216 // 2, 9216].ranks == 2 and found[9216 // 2, 9216].uses == (*q_k_v, "opt66b fc1, tensor 8")
    assert found[9216, 36864 // 8].ranks == 2 and "opt66b out_proj, tensor 2" in found[9216, 36864 // 8].uses
    assert found[128, 4096].uses == ("llama3-8b k_proj, tensor 8", "llama3-8b v_proj, tensor 8")
    assert found[4096, 512].uses == ("llama3-8b o_proj, tensor 8",)


def test_ranks_that_do_not_divide_are_left_out() -> None:
    with pytest.raises(UserError, match="3 tensor ranks: 4096 does not divide into 3"):
        block_linears(shipped("llama3-8b")[0][1], 3)
    assert matrices(shipped("llama3-8b"), [3]) == []


def test_the_most_important_come_first() -> None:
    made = list(gemm.cases(matrices(shipped("opt13b", "opt66b"), [1, 2]), gemm.TOKENS, BF16, CPU))
    assert [str(case) for case in made[:3]] == [
        "forward 9216 x 36864, 8192 tokens, bfloat16",
        "input gradient 9216 x 36864, 8192 tokens, bfloat16",
        "forward 36864 x 9216, 8192 tokens, bfloat16",
    ]
    whole = [case.matrix.ranks == 1 for case in made]
    assert whole == sorted(whole, reverse=True)
    assert {case.tokens for case in made if case.kind == "input gradient"} == {128, 512, 2048, 4096, 8192, 16384}
    assert {case.tokens for case in made if case.kind == "forward"} == set(gemm.TOKENS)
    assert len({str(case) for case in made}) == len(made), "cells have names of their own"


@pytest.mark.parametrize("kind", ["forward", "input gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_reference_is_the_rival_on_the_cpu(kind: gemm.Kind, dtype: torch.dtype) -> None:
    row = gemm.measure(gemm.Case(kind, 24, SMALL, dtype, CPU), None, 0, None)
    derived = {gemm.REFERENCE_DERIVED} if kind == "input gradient" else set()
    assert set(row["rivals"]) == {gemm.DENSE, gemm.REFERENCE} | derived
    dense = row["rivals"][gemm.DENSE]
    assert dense["ratio"] == 1 and dense["tflops"] == pytest.approx(2e-12 * 24 * 64 * 96 / dense["seconds"])
    assert "bound_share" not in dense, "nobody knows the peaks of a processor"


@pytest.mark.parametrize("kind", ["forward", "input gradient"])
def test_a_dispatcher_is_measured_beside_its_routes(kind: gemm.Kind, dispatcher: Dispatcher) -> None:
    card = gpus.peaks_of("NVIDIA H200")
    row = gemm.measure(gemm.Case(kind, 24, SMALL, BF16, CPU), dispatcher, 0, card)
    derived = {gemm.DERIVED} if kind == "input gradient" else set()
    assert set(row["rivals"]) == {gemm.DENSE, gemm.DISPATCHER, "expand"} | derived
    assert row["choice"]["label"] == "expand" and row["choice"]["rejected"] == {}
    # The input gradient's products are over the transpose.
    rows, columns = (64, 96) if kind == "forward" else (96, 64)
    assert dispatcher.product_choice(Problem(24, rows, columns, BF16, CPU)).label == "expand"
    for name, rival in row["rivals"].items():
        assert rival["bound_share"] == pytest.approx(rival["bound_seconds"] / rival["seconds"])
        assert ("error" in rival) == (name != gemm.DENSE)


@pytest.mark.parametrize("spoil", [1.02, float("nan")])
@pytest.mark.parametrize("kind", ["forward", "input gradient"])
def test_a_wrong_rival_is_not_timed(
    kind: gemm.Kind, spoil: float, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm.timing, "in_turns", lambda *a, **k: pytest.fail("a wrong rival was timed"))
    case = gemm.Case(kind, 24, SMALL, BF16, CPU)
    right = reference.forward
    with monkeypatch.context() as wrong:
        wrong.setattr(reference, "forward", lambda *arguments: right(*arguments) * spoil)
        with pytest.raises(WrongResultError, match=f"{kind} 64 x 96, 24 tokens, bfloat16: reference is off"):
            gemm.measure(case, None, 0, None)
    find = Dispatcher._find

    def spoilt(self: Dispatcher, *arguments) -> dispatch.Candidate:
        candidate = find(self, *arguments)
        return replace(candidate, run=lambda operands: candidate.run(operands) * spoil)

    monkeypatch.setattr(Dispatcher, "_find", spoilt)
    with pytest.raises(WrongResultError, match="dispatcher is off the dense masked product"):
        gemm.measure(case, dispatcher, 0, None)


def test_an_input_gradient_over_the_singly_pruned_weight_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def singly(values, indices, pattern):
        dense = reference.codec.expand(values, indices, pattern).t().contiguous()
        kept = gemm.codec.mask_of(indices, pattern).t().contiguous()
        return dense, kept

    monkeypatch.setattr(gemm.pruning, "doubly_pruned_transpose", singly)
    monkeypatch.setattr(reference, "input_gradient_resident", lambda x, dense, kept, pattern: x @ dense.t())
    with pytest.raises(WrongResultError, match="reference is off"):
        gemm.measure(gemm.Case("input gradient", 24, SMALL, BF16, CPU), None, 0, None)


def test_the_roofline() -> None:
    card = gpus.Peaks(dense=1e12, sparse=2e12, bandwidth=1e12)
    # 2 * 1000^3 operations at 1e12; half of it sparse. The bytes, 6e6, take 6e-6 seconds.
    assert peaks.least_seconds(card, 1000, 1000, 1000, sparse=False) == pytest.approx(2e-3)
    assert peaks.least_seconds(card, 1000, 1000, 1000, sparse=True) == pytest.approx(1e-3)
    # One token: 2 bytes an element of the weight, or 9 bits, and 4000 bytes of vectors.
    assert peaks.least_seconds(card, 1, 1000, 1000, sparse=False) == pytest.approx(2.004e-6)
    assert peaks.least_seconds(card, 1, 1000, 1000, sparse=True) == pytest.approx(1.129e-6)
    assert gpus.peaks_of("AMD EPYC") is None
