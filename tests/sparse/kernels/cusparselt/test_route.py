"""Products through the route are the reference's, however the operand lies, in whatever order the library wants it.

Against the stand-in, on the CPU: nothing here says that the real library does the same on a card.

Run: pytest tests/sparse/kernels/cusparselt/test_route.py
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slope_dist.sparse.kernels.cusparselt import STANDING, Algorithm, CusparseltRoute, segment_k
from slope_dist.sparse.kernels.cusparselt import route as route_module
from slope_dist.sparse.kernels.cusparselt.library import StatusError
from slope_dist.sparse.kernels.metadata import MetadataLayout
from slope_dist.sparse.kernels.problem import Problem
from tests.sparse.kernels.cusparselt.conftest import StandIn
from tests.sparse.kernels.cusparselt.operands import Operands, close

pytestmark = pytest.mark.usefixtures("nan_scratch")

CPU = torch.device("cpu")
T, O, I = 24, 32, 48  # noqa: E741
DTYPES = [torch.bfloat16, torch.float16]
METADATA_FIRST, VALUES_BY_COLUMN = 1, 2
OTHER_CODES, PADDED = 3, 5

PRODUCT = "Matmul"
COMPRESSION = "SpMMACompress2"


def layout_of(route: CusparseltRoute, operands: Operands) -> MetadataLayout:
    layout = route.metadata_layout(*operands.values.shape[:1], operands.x.shape[1], operands.x.dtype)
    assert layout is not None
    return layout


def in_place(route: CusparseltRoute, operands: Operands) -> tuple[Tensor, Tensor | None]:
    return operands.in_place(layout_of(route, operands))


def apart(route: CusparseltRoute, operands: Operands) -> tuple[Tensor, Tensor | None]:
    return operands.values, layout_of(route, operands).vendor(operands.indices)


def derived(route: CusparseltRoute, operands: Operands) -> tuple[Tensor, Tensor | None]:
    layout_of(route, operands)
    return operands.values, None


WAYS = [in_place, apart, derived]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("tokens", [1, 8, 23, 40])
@pytest.mark.parametrize(("bias", "addend"), [(False, False), (True, False), (False, True), (True, True)])
def test_numbers(standin: StandIn, tokens: int, dtype: torch.dtype, way: Callable, bias: bool, addend: bool) -> None:
    route, operands = standin.route(), Operands(tokens, O, I, dtype)
    values, metadata = way(route, operands)
    standin.forget_calls()
    before = operands.addend.clone()
    for config in (0, 1):
        y = route.product(
            operands.x,
            values,
            operands.indices,
            metadata,
            Algorithm(config),
            bias=operands.bias if bias else None,
            addend=operands.addend if addend else None,
        )
        assert y.shape == (tokens, O) and y.dtype == dtype and y.is_contiguous()
        assert close(y, operands.expected(bias=bias, addend=addend))
    assert operands.addend.equal(before)
    assert COMPRESSION not in standin.names


def test_values_are_used_where_they_lie_and_only_there(standin: StandIn) -> None:
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    for way, lies in ((in_place, True), (apart, False)):
        values, metadata = way(route, operands)
        standin.forget_calls()
        route.product(operands.x, values, operands.indices, metadata, Algorithm(0))
        assert (standin.calls[-1].arguments[3] == values.data_ptr()) is lies


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_values_overwritten_in_place_are_the_next_products(standin: StandIn, way: Callable) -> None:
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    values, metadata = way(route, operands)
    for step in range(3):
        operands.values = torch.randn(O, I // 2, generator=torch.Generator().manual_seed(step)).bfloat16()
        values.copy_(operands.values)
        standin.forget_calls()
        y = route.product(operands.x, values, operands.indices, metadata, Algorithm(0))
        assert close(y, operands.expected())
        assert COMPRESSION not in standin.names


@pytest.mark.parametrize(
    "setting",
    [{"values": METADATA_FIRST}, {"values": VALUES_BY_COLUMN}, {"metadata": OTHER_CODES}, {"metadata": PADDED}],
    ids=["metadata first", "values by column", "other codes", "padded"],
)
def test_an_unknown_order_is_compressed_for_each_product_and_right(standin: StandIn, setting: dict[str, int]) -> None:
    standin.set(**setting)
    route, operands = standin.route(), Operands(23, O, I, torch.bfloat16)
    assert route.unsupported(Problem(23, O, I, torch.bfloat16, CPU)) is None
    # Kept zeros, of which the compressor chooses the positions, and a group that keeps nothing else.
    operands.values[:, ::3] = 0
    operands.values[:, 1::6] = -0.0
    operands.values[0, :4] = 0
    standin.forget_calls()
    y = route.product(operands.x, operands.values, operands.indices, None, Algorithm(1), bias=operands.bias)
    assert close(y, operands.expected(bias=True))
    assert [name for name in standin.names if name in (COMPRESSION, PRODUCT)] == [COMPRESSION, PRODUCT]


def test_kept_zeros_keep_their_metadata(standin: StandIn) -> None:
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    values, metadata = in_place(route, operands)
    values.zero_()
    route.product(operands.x, values, operands.indices, metadata, Algorithm(0))
    values.copy_(operands.values)
    assert close(route.product(operands.x, values, operands.indices, metadata, Algorithm(0)), operands.expected())


def shifted(tensor: Tensor) -> Tensor:
    """A copy that begins two bytes off the alignment."""
    buffer = torch.empty(tensor.numel() + 9, dtype=tensor.dtype)
    start = (2 - buffer.data_ptr() % 16) % 16 // 2
    view = buffer[start : start + tensor.numel()].view(tensor.shape)
    assert view.data_ptr() % 16 == 2
    return view.copy_(tensor)


@pytest.mark.parametrize("way", [in_place, apart, derived], ids=lambda way: way.__name__)
def test_unaligned_and_strided_operands_are_copied(standin: StandIn, way: Callable) -> None:
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    values, metadata = way(route, operands)
    if way is in_place and metadata is not None:
        joined = shifted(torch.cat([values.view(-1), metadata.view(torch.bfloat16)]))
        values, metadata = joined[: values.numel()].view(O, -1), joined[values.numel() :].view(torch.uint8)
    else:
        values = shifted(values)
    xs = [shifted(operands.x), operands.x.t().contiguous().t(), operands.x.repeat(1, 2)[:, :I]]
    for x in xs:
        y = route.product(
            x,
            values,
            operands.indices,
            metadata,
            Algorithm(0),
            bias=shifted(operands.bias),
            addend=shifted(operands.addend),
        )
        assert close(y, operands.expected(bias=True, addend=True))


def test_biases_that_are_not_aligned_share_a_plan(standin: StandIn) -> None:
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    layout_of(route, operands)
    standin.forget_calls()
    biases = [shifted(operands.bias) for _ in range(3)]
    for bias in biases:
        y = route.product(operands.x, operands.values, operands.indices, None, Algorithm(0), bias=bias)
        assert close(y, operands.expected(bias=True))
    assert standin.names.count("MatmulPlanInit") == 1


def test_threads_share_a_handle_and_no_scratch(standin: StandIn) -> None:
    route = standin.route()
    problems = [Operands(T, O, I, torch.bfloat16, seed) for seed in range(2)]
    standin.set(delay_us=2000)
    wrong: list[str] = []

    def work(operands: Operands) -> None:
        for _ in range(20):
            y = route.product(operands.x, operands.values, operands.indices, None, Algorithm(1), bias=operands.bias)
            if not close(y, operands.expected(bias=True)):
                wrong.append("a product of one thread holds what another wrote")

    threads = [threading.Thread(target=work, args=(operands,)) for operands in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert standin.names.count("Init") == 1 and standin.names.count(PRODUCT) == 40


def test_the_stream_is_that_of_the_moment(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    streams = iter([0x10, 0x20, 0x10])
    monkeypatch.setattr(route_module, "stream_of", lambda device: next(streams))
    layout_of(route, operands)
    for stream in (0x10, 0x20, 0x10):
        route.product(operands.x, operands.values, operands.indices, None, Algorithm(1))
        assert standin.calls[-1].arguments[9] == stream


def problem(tokens: int = T, rows: int = O, columns: int = I, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(tokens, rows, columns, dtype, CPU)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (problem(dtype=torch.float32), "not for float32"),
        (problem(rows=O + 8), "multiples of 16, not 40 x 48"),
        (problem(columns=I + 8), "multiples of 16, not 32 x 56"),
        (problem(tokens=2**31 // I), "up to 2147483647 elements"),
    ],
    ids=["dtype", "rows", "columns", "size"],
)
def test_what_cannot_be_computed_is_refused_in_words(standin: StandIn, asked: Problem, reason: str) -> None:
    said = standin.route().unsupported(asked)
    assert said is not None and reason in said and "\n" not in said


@pytest.mark.parametrize("tokens", [1, 7, 8, 4096])
def test_any_number_of_tokens_is_supported(standin: StandIn, tokens: int) -> None:
    assert standin.route().unsupported(problem(tokens)) is None


@pytest.mark.parametrize("inclusive", [0, 1], ids=["highest is none", "highest is one"])
@pytest.mark.parametrize("highest", [1, 4, 21])
def test_every_algorithm_is_named_once(standin: StandIn, highest: int, inclusive: int) -> None:
    standin.set(highest_algorithm=highest, inclusive=inclusive)
    algorithms = standin.route().algorithms(problem(tokens=23))
    assert algorithms == [Algorithm(config) for config in range(highest + inclusive)]
    assert standin.live == 0


def test_algorithms_are_plain_short_and_say_whether_they_repeat() -> None:
    whole, split = Algorithm(17), Algorithm(17, -1)
    assert (str(whole), str(split)) == ("17", "17 segment-k")
    assert whole.deterministic and not split.deterministic
    assert json.loads(json.dumps(dataclasses.asdict(split))) == {"config": 17, "split_k": -1}


def test_wrong_and_failing_algorithms_show(standin: StandIn) -> None:
    standin.set(wrong_algorithm=1, failing_algorithm=2)
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    outcome = []
    for algorithm in route.algorithms(problem()):
        try:
            y = route.product(operands.x, operands.values, operands.indices, None, algorithm)
        except StatusError as error:
            outcome.append(error.status_name)
        else:
            outcome.append("right" if close(y, operands.expected()) else "wrong")
    assert outcome == ["right", "wrong", "CUSPARSE_STATUS_NOT_SUPPORTED"]


UNSUPPORTED, WORKS, HANGS = range(3)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_module, "_generation", lambda device: 9)
    monkeypatch.setattr(segment_k, "SIZE", 16)
    segment_k.answers.cache_clear()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("behaviour", "offered"), [(WORKS, True), (HANGS, False)], ids=["works", "hangs"])
def test_segment_k_is_offered_where_it_comes_back(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, behaviour: int, offered: bool
) -> None:
    monkeypatch.setenv("STANDIN_SEGMENT_K", str(behaviour))
    if behaviour == HANGS:
        monkeypatch.setattr(segment_k, "TRIAL_SECONDS", 6)
    route = standin.route()
    split = [algorithm for algorithm in route.algorithms(problem()) if algorithm.split_k != 1]
    assert split == ([Algorithm(config, -1) for config in range(3)] if offered else [])
    # This process never asked for such a plan.
    assert "MatmulPlanInit" not in standin.names
    if offered:
        standin.set(segment_k=WORKS)
        operands = Operands(T, O, I, torch.bfloat16)
        y = route.product(operands.x, operands.values, operands.indices, None, split[0])
        assert close(y, operands.expected())


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("behaviour", "code"), [(UNSUPPORTED, segment_k.REFUSED), (WORKS, 0)], ids=["unsupported", "works"]
)
def test_the_trial_of_segment_k_tells_by_its_exit_code(standin: StandIn, behaviour: int, code: int) -> None:
    standin.set(segment_k=behaviour)
    assert segment_k.main(str(standin.path), "cpu") == code
    set_attributes = [call.arguments for call in standin.calls if call.name == "MatmulAlgSetAttribute"]
    assert set_attributes[-1][2:4] == (3, -1)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("answers", [True, False, None])
def test_what_the_trial_told_is_asked_for_once_and_no_more_where_it_is_known(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, answers: bool | None
) -> None:
    """A trial that could not begin has told nothing."""
    asked = []
    monkeypatch.setattr(segment_k, "answers", lambda path, device: asked.append(path) or answers)
    route = standin.route()
    offered = [any(algorithm.split_k != 1 for algorithm in route.algorithms(problem())) for _ in range(2)]
    assert offered == [answers is True] * 2
    assert route.findings == {"segment-k": answers} and len(asked) == 1


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("program", "told"), [("exit 0", True), ("exit 3", False), ("kill -9 $$", False), ("exit 1", None), (None, None)]
)
def test_only_a_trial_that_took_place_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, told: bool | None
) -> None:
    """Not one that could not open the card, or for which there was no process."""
    python = tmp_path / "python"
    if program is not None:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
    monkeypatch.setattr(segment_k.sys, "executable", str(python))
    assert segment_k.answers("library", torch.device("cpu")) is told


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("said", "told"), [(segment_k.BEGUN, False), ("importing", None)])
def test_a_trial_that_hangs_tells_once_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: bool | None
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {said}\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(segment_k.sys, "executable", str(python))
    monkeypatch.setattr(segment_k, "TRIAL_SECONDS", 1)
    assert segment_k.answers("library", torch.device("cpu")) is told


def test_segment_k_is_not_tried_elsewhere(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_k, "answers", lambda path, device: pytest.fail("tried"))
    assert all(algorithm.split_k == 1 for algorithm in standin.route().algorithms(problem()))


def test_the_route_says_what_it_is(standin: StandIn) -> None:
    route = standin.route()
    assert (route.name, route.version, route.standing) == ("cuSPARSELt", "0.8.1", "not yet proven on a card")
    assert route.standing == STANDING


def test_operands_that_do_not_fit_are_a_defect(standin: StandIn) -> None:
    route, operands = standin.route(), Operands(T, O, I, torch.bfloat16)
    with pytest.raises(AssertionError, match="beyond"):
        route.product(operands.x[:, :32].contiguous(), operands.values, operands.indices, None, Algorithm(0))
    with pytest.raises(AssertionError, match="beyond"):
        route.product(operands.x.half(), operands.values, operands.indices, None, Algorithm(0))
    assert PRODUCT not in standin.names
