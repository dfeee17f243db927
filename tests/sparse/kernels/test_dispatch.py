"""A dispatcher takes the fastest way that is right, says why, keeps it, and never measures when it must not.

Run: pytest tests/sparse/kernels/test_dispatch.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slope_dist.sparse import codec, kernels
from slope_dist.sparse.kernels import dispatch, judging, measuring, primitives
from slope_dist.sparse.kernels.candidates import Operands
from slope_dist.sparse.kernels.dispatch import Arrangement, Dispatcher, round_tokens
from slope_dist.sparse.kernels.vendor import VendorError
from tests.sparse.kernels.vendors import PlainAlgorithm, PlainVendor, preferring, vendors

pytestmark = pytest.mark.usefixtures("plain_primitives")
CPU = torch.device("cpu")
PROBLEM = kernels.Problem(16, 64, 32, torch.float32, CPU)
SQUARE = kernels.Problem(16, 64, 64, torch.float32, CPU)
"""Has no tiles, which would add what an algorithm leaves out."""


def never(calls: Mapping[str, object], device: torch.device, cold: bool) -> dict[str, float]:
    raise AssertionError(f"measured {sorted(calls)}")


def operands(problem: kernels.Problem) -> Operands:
    values, indices = primitives.random_matrix(problem.rows, problem.columns, problem.dtype, CPU)
    return Operands(torch.randn(problem.tokens, problem.columns, dtype=problem.dtype), values, indices)


def check_product(dispatcher: Dispatcher, problem: kernels.Problem) -> None:
    given = operands(problem)
    expected = given.x @ codec.expand(given.values, given.indices, primitives.TWO_FOUR).t()
    torch.testing.assert_close(dispatcher.product(given), expected)


def test_the_fastest_is_taken_and_the_reason_is_said() -> None:
    dispatcher = Dispatcher(CPU, vendors(PlainVendor()), timer=preferring("plain/1 right", "expand"))
    choice = dispatcher.product_choice(PROBLEM)
    assert (choice.route, choice.vendor, choice.algorithm, choice.ratio) == ("sparse", "plain", "right", 0.5)
    assert choice.why == "0.50x the time of dense; next best: expand, 0.51x"
    check_product(dispatcher, PROBLEM)
    lines = dispatcher.report()
    assert "plain 1: a stand-in" in lines
    assert f"product {PROBLEM}: plain/1 right, {choice.why}" in lines


@pytest.mark.parametrize(("tokens", "cold"), [(1, True), (32, True), (33, False)])
def test_few_tokens_are_timed_with_cold_caches(tokens: int, cold: bool) -> None:
    asked = []

    def timer(calls: Mapping[str, object], device: torch.device, cold: bool) -> dict[str, float]:
        asked.append(cold)
        return dict.fromkeys(calls, 1.0)

    Dispatcher(CPU, timer=timer).product_choice(kernels.Problem(tokens, 64, 32, torch.float32, CPU))
    assert asked == [cold]


def test_measuring_takes_nothing_from_the_random_stream() -> None:
    before = torch.get_rng_state()
    Dispatcher(CPU, vendors(PlainVendor())).warm_up([("product", PROBLEM), ("input gradient", PROBLEM)])
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    "kind",
    ["wrong", "nan", "failing", "without bias", "without addend", "without lone bias", "without lone addend"],
)
def test_what_is_wrong_is_never_taken_however_fast(kind: str) -> None:
    vendor = PlainVendor((PlainAlgorithm(kind), PlainAlgorithm("right")))
    choice = Dispatcher(CPU, vendors(vendor), timer=preferring(kind, "right")).product_choice(SQUARE)
    assert choice.algorithm == "right"
    reason = choice.rejected[f"plain/1 {kind}"]
    assert ("not supported" if kind == "failing" else "off the reference") in reason


@pytest.mark.parametrize("claims", [True, False], ids=["called deterministic", "not called so"])
def test_other_bits_the_second_time_are_wrong_where_the_same_are_promised(claims: bool) -> None:
    vendor = PlainVendor((PlainAlgorithm("unsteady", deterministic=claims), PlainAlgorithm("right")))
    choice = Dispatcher(CPU, vendors(vendor), timer=preferring("unsteady", "right")).product_choice(SQUARE)
    assert choice.algorithm == ("right" if claims else "unsteady in any order")
    assert choice.rejected == ({"plain/1 unsteady": judging.OTHER_BITS} if claims else {})


def test_other_bits_another_time_are_seen_too() -> None:
    vendor = PlainVendor((PlainAlgorithm("late"), PlainAlgorithm("right")))
    choice = Dispatcher(CPU, vendors(vendor), timer=preferring("late", "right")).product_choice(SQUARE)
    assert choice.algorithm == "right" and choice.rejected == {"plain/1 late": judging.OTHER_BITS}


def test_no_tokens_are_no_product_to_measure() -> None:
    dispatcher = Dispatcher(CPU, vendors(PlainVendor()), timer=never)
    given = operands(replace(PROBLEM, tokens=0))
    assert dispatcher.product(given).shape == (0, PROBLEM.rows)
    gradient = dispatcher.input_gradient(replace(given, x=given.x.new_empty(0, PROBLEM.rows)))
    assert gradient.shape == (0, PROBLEM.columns)


def test_dense_is_timed_with_a_weight_that_has_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = []

    def timer(calls: Mapping[str, Callable[[], object]], device: torch.device, cold: bool) -> dict[str, float]:
        linear = torch.nn.functional.linear
        with monkeypatch.context() as patch:
            patch.setattr(judging.functional, "linear", lambda x, w: zeros.append(int((w == 0).sum())) or linear(x, w))
            calls[measuring.DENSE]()
        return dict.fromkeys(calls, 1.0)

    Dispatcher(CPU, timer=timer).warm_up([("product", PROBLEM), ("input gradient", PROBLEM)])
    assert zeros and not any(zeros)


def test_kept_metadata_that_lie_behind_the_values_by_chance_are_measured_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vendor, lay = PlainVendor(), Dispatcher.lay

    def by_chance(self: Dispatcher, *given: torch.Tensor) -> tuple:
        with monkeypatch.context() as patch:
            patch.setattr(self, "arrangement", "in place")
            return lay(self, *given)

    monkeypatch.setattr(Dispatcher, "lay", by_chance)
    Dispatcher(CPU, vendors(vendor), arrangement="kept", timer=preferring("plain")).product_choice(SQUARE)
    assert set(vendor.seen) == {"kept"}


def test_algorithms_of_a_form_share_one_copy_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    laid, lay = [], Dispatcher.lay
    monkeypatch.setattr(Dispatcher, "lay", lambda self, *given: laid.append(1) or lay(self, *given))
    vendor = PlainVendor(tuple(PlainAlgorithm(f"right {number}") for number in range(5)))
    dispatcher = Dispatcher(CPU, vendors(vendor), arrangement="in place", timer=preferring("plain"))
    assert len(dispatcher.product_choice(SQUARE).seconds) == 6 and len(laid) == 1


@pytest.mark.parametrize("told", [False, None], ids=["an answer", "no answer"])
def test_what_trials_of_the_device_told_is_kept_and_taken_over(told: bool | None, tmp_path: Path) -> None:
    """However weights lie. Without an answer a trial is not repeated in this run, and is in the next."""

    class Trying(PlainVendor):
        """Tries something for minutes, unless it is known."""

        tried = 0

        def algorithms(self, problem: kernels.Problem) -> tuple[PlainAlgorithm, ...]:
            if "long" not in self.findings:
                self.tried += 1
                self.findings["long"] = told
            return self.kinds

    path = tmp_path / "kernels.json"
    made = []
    arrangements: tuple[Arrangement, ...] = ("kept", "in place")
    for problem, arrangement in zip((SQUARE, PROBLEM), arrangements, strict=True):
        made.append(Trying())
        store = kernels.ChoiceStore(path)
        first = Dispatcher(CPU, vendors(made[-1]), store, arrangement=arrangement, timer=preferring("plain"))
        for _ in range(2):
            first.product_choice(problem)
    other = Trying()
    adopting = Dispatcher(CPU, vendors(other), arrangement="in place", timer=preferring("plain"))
    adopting.adopt(*json.loads(json.dumps([first.as_data(), first.findings()])))
    adopting.product_choice(SQUARE)
    assert [vendor.tried for vendor in (*made, other)] == [1, 0 if told is False else 1, 0]


class RefusingVendor(PlainVendor):
    """Refuses a shape only when it is asked for algorithms."""

    def algorithms(self, problem: kernels.Problem) -> tuple[PlainAlgorithm, ...]:
        raise VendorError(f"plain refuses {problem}")


@pytest.mark.parametrize(
    ("vendor", "reason"),
    [
        (PlainVendor(least_rows=100), "fewer than 100 rows"),
        (PlainVendor(()), f"plain names no algorithm for {SQUARE}"),
        (RefusingVendor(), f"plain refuses {SQUARE}"),
    ],
    ids=["unsupported", "no algorithm", "refusing"],
)
def test_a_library_that_computes_nothing_of_a_problem_is_passed_over_and_the_reason_is_said(
    vendor: PlainVendor, reason: str
) -> None:
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=preferring("plain"))
    assert dispatcher.product_choice(SQUARE).route == "expand"
    assert dispatcher.report().count(f"without plain/1: {reason}") == 1


def test_it_is_said_that_there_is_no_triton() -> None:
    assert "without Triton: not in this test; plain torch expands and transposes" in Dispatcher(CPU).report()


def test_measuring_is_done_with_the_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def timer(calls: Mapping[str, object], device: torch.device, cold: bool) -> dict[str, float]:
        assert current == [device]
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(dispatch, "on", on)
    Dispatcher(CPU, timer=timer).product_choice(PROBLEM)


def test_a_high_weight_may_be_cut_into_square_tiles() -> None:
    vendor = PlainVendor()
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=preferring("plain/2"))
    choice = dispatcher.product_choice(PROBLEM)
    assert choice.route == "tiled"
    check_product(dispatcher, PROBLEM)
    given = operands(PROBLEM)
    form, metadata = dispatcher.metadata(given.indices, torch.float32) or ("", None)
    assert form == "plain/2"
    bias, addend = torch.randn(64), torch.randn(16, 64)
    vendor.seen.clear()
    y = dispatcher.product(Operands(given.x, given.values, given.indices, form, metadata, bias, addend))
    dense = codec.expand(given.values, given.indices, primitives.TWO_FOUR)
    torch.testing.assert_close(y, given.x @ dense.t() + bias + addend)
    assert vendor.seen == ["kept", "kept"]


@pytest.mark.parametrize(("arrangement", "seen"), [("in place", "in place"), ("kept", "kept"), ("derived", "none")])
def test_weights_lie_as_arranged_when_measured_and_when_used(arrangement: Arrangement, seen: str) -> None:
    vendor = PlainVendor()
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=preferring("plain/1"), arrangement=arrangement)
    dispatcher.product_choice(PROBLEM)
    assert vendor.seen[0] == seen
    given = operands(PROBLEM)
    values, metadata = dispatcher.lay(given.values, given.indices)
    assert values.equal(given.values)
    vendor.seen.clear()
    dispatcher.product(Operands(given.x, values, given.indices, *(metadata or ("", None))))
    assert vendor.seen == [seen]


def test_metadata_in_another_form_than_the_product_wants_is_not_read() -> None:
    vendor = PlainVendor()
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=preferring("plain/1"))
    dispatcher.product_choice(PROBLEM)
    given = operands(PROBLEM)
    vendor.seen.clear()
    garbage = torch.zeros(64 * 32 // 8, dtype=torch.uint8)
    y = dispatcher.product(Operands(given.x, given.values, given.indices, "plain/2", garbage))
    dense = codec.expand(given.values, given.indices, primitives.TWO_FOUR)
    torch.testing.assert_close(y, given.x @ dense.t())
    assert vendor.seen == ["none"]


@pytest.mark.parametrize("route", ["expand", "transpose"])
@pytest.mark.parametrize("held", [False, True], ids=["by magnitude", "held"])
def test_input_gradients(route: str, held: bool) -> None:
    dispatcher = Dispatcher(CPU, vendors(PlainVendor()), timer=preferring(route, "plain"))
    given = operands(PROBLEM)
    grad_y = torch.randn(16, 64)
    mask = codec.pack_bits(torch.rand(64, 32) < 0.3) if held else None
    kept = None
    if mask is not None:
        # At most two of four in a column, of what is kept in its row.
        bits = codec.unpack_bits(mask) & codec.mask_of(given.indices, primitives.TWO_FOUR)
        order = bits.view(16, 4, 32).cumsum(1).view(64, 32)
        kept = bits & (order <= 2)
        mask = codec.pack_bits(kept)
    from slope_dist.sparse import pruning

    expected = grad_y @ pruning.doubly_pruned(given.values, given.indices, primitives.TWO_FOUR, kept)
    found = dispatcher.input_gradient(Operands(grad_y, given.values, given.indices, column_mask=mask))
    torch.testing.assert_close(found, expected)
    choice = dispatcher.input_gradient_choice(PROBLEM)
    assert choice.label.startswith(route)


def test_other_numbers_of_tokens_take_the_choice_of_the_next_power_of_two() -> None:
    assert [round_tokens(tokens) for tokens in (1, 2, 3, 17, 64, 65)] == [1, 2, 4, 32, 64, 128]
    dispatcher = Dispatcher(CPU, timer=preferring("expand"))
    dispatcher.product_choice(kernels.Problem(64, 64, 32, torch.float32, CPU))
    dispatcher._timer = never
    check_product(dispatcher, kernels.Problem(50, 64, 32, torch.float32, CPU))


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    store = kernels.ChoiceStore(tmp_path / "new" / "kernels.json")
    first = Dispatcher(CPU, vendors(PlainVendor()), store, timer=preferring("plain/2"))
    first.warm_up([("product", PROBLEM), ("input gradient", PROBLEM)])
    again = Dispatcher(CPU, vendors(PlainVendor()), kernels.ChoiceStore(store.path), timer=never)
    assert again.product_choice(PROBLEM).as_data() == first.product_choice(PROBLEM).as_data()
    assert again.input_gradient_choice(PROBLEM).label == first.input_gradient_choice(PROBLEM).label
    check_product(again, PROBLEM)
    adopting = Dispatcher(CPU, vendors(PlainVendor()), timer=never)
    adopting.adopt(json.loads(json.dumps(first.as_data())), {})
    assert adopting.product_choice(PROBLEM).label == "plain/2 right"


@pytest.mark.parametrize("change", ["version", "arrangement", "algorithms"])
def test_a_choice_of_another_setting_is_measured_anew(change: str, tmp_path: Path) -> None:
    store = kernels.ChoiceStore(tmp_path / "kernels.json")
    Dispatcher(CPU, vendors(PlainVendor()), store, timer=preferring("plain/1")).product_choice(PROBLEM)
    other = PlainVendor(
        (PlainAlgorithm("right", deterministic=False),) if change == "algorithms" else (PlainAlgorithm("right"),),
        version="2" if change == "version" else "1",
    )
    arrangement: Arrangement = "in place" if change == "arrangement" else "kept"
    changed = Dispatcher(CPU, vendors(other), store, timer=preferring("expand"), arrangement=arrangement)
    assert changed.product_choice(PROBLEM).route == "expand"


def test_deterministic_mode_neither_measures_in_passing_nor_takes_what_varies() -> None:
    vendor = PlainVendor((PlainAlgorithm("right", deterministic=False),))
    timer = preferring("any order")
    assert "any order" in Dispatcher(CPU, vendors(vendor), timer=timer).product_choice(PROBLEM).label
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=timer, deterministic=True)
    choice = dispatcher.product_choice(PROBLEM)
    assert choice.route == "expand"
    assert choice.rejected["plain/1 right in any order"] == "not deterministic"
    dispatcher._timer = never
    other = kernels.Problem(128, 64, 32, torch.float32, CPU)
    check_product(dispatcher, other)
    # What was not known then may be later.
    dispatcher._timer = preferring("plain/1")
    vendor.kinds = (PlainAlgorithm("right"),)
    dispatcher.warm_up([("product", other)])
    vendor.seen.clear()
    check_product(dispatcher, other)
    assert vendor.seen


def test_once_settled_nothing_is_measured() -> None:
    dispatcher = Dispatcher(CPU, vendors(PlainVendor()), timer=preferring("plain/1"))
    dispatcher.warm_up([("product", PROBLEM)])
    dispatcher.settle()
    dispatcher._timer = never
    check_product(dispatcher, PROBLEM)
    check_product(dispatcher, kernels.Problem(128, 64, 32, torch.float32, CPU))
    assert len(dispatcher.as_data()) == 1


def test_the_clock_measures_every_call() -> None:
    counts = {"a": 0, "b": 0}

    def count(name: str) -> None:
        counts[name] += 1

    taken = measuring.median_seconds({name: lambda name=name: count(name) for name in counts}, CPU, cold=False)
    assert set(taken) == set(counts) and all(seconds > 0 for seconds in taken.values())
    assert all(count >= measuring.ROUNDS for count in counts.values())


def test_only_the_fastest_are_timed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """And dense, however slow; what was left behind stays behind, whatever the later rounds say."""
    costs = {f"way {number}": 1.0 + number for number in range(20)} | {"dense": 100.0}
    samples = dict.fromkeys(costs, 0)

    def time_calls(call: Callable[[], str], times: int, device: torch.device) -> float:
        name = call()
        samples[name] += 1
        # The machine is slower later on.
        return times * costs[name] * (1 if samples[name] <= 2 + measuring.FIRST_ROUNDS else 5)

    monkeypatch.setattr(measuring, "_cpu_seconds", time_calls)
    taken = measuring.median_seconds({name: lambda name=name: name for name in costs}, CPU, cold=False)
    assert taken == {name: 5 * cost for name, cost in costs.items()}
    # Two samples tell how long a call takes.
    long = {name for name, count in samples.items() if count == 2 + measuring.FIRST_ROUNDS + measuring.ROUNDS}
    assert long == {"way 0", "way 1", "way 2", "way 3", "dense"}
    assert {count for name, count in samples.items() if name not in long} == {2 + measuring.FIRST_ROUNDS}


def test_no_kernel_is_used_without_a_dispatcher() -> None:
    given = operands(PROBLEM)
    with pytest.raises(RuntimeError, match="no dispatcher"):
        torch.ops.slope_dist.product(given.x, given.values, given.indices, "", None, None, None)


@pytest.mark.parametrize("arrangement", ["in place", "kept"])
def test_a_resident_transpose_lies_where_its_library_reads_it_however_weights_lie(arrangement: Arrangement) -> None:
    vendor = PlainVendor()
    dispatcher = Dispatcher(CPU, vendors(vendor), timer=preferring("plain/1"), arrangement=arrangement)
    dispatcher.product_choice(PROBLEM.transposed())
    given = operands(PROBLEM)
    values, indices, metadata = dispatcher.lay_transpose(given.values, given.indices, None)
    expected = primitives.transpose(given.values, given.indices, None)
    assert values.equal(expected[0]) and indices.equal(expected[1])
    vendor.seen.clear()
    grad_y = torch.randn(16, 64)
    y = dispatcher.product(Operands(grad_y, values, indices, *(metadata or ("", None))))
    torch.testing.assert_close(y, grad_y @ codec.expand(*expected, primitives.TWO_FOUR).t())
    assert vendor.seen == ["in place"]


def test_a_weight_keeps_one_form_of_metadata_and_fewer_tokens_take_the_best_that_reads_it() -> None:
    """Another form would be made anew for every product, which is not what was timed."""
    one, other = PlainVendor(name="one"), PlainVendor(name="other")
    preferred = {4: "one/1", 16: "other/1"}
    tokens = 0

    def timer(calls: Mapping[str, Callable[[], object]], device: torch.device, cold: bool) -> dict[str, float]:
        return preferring(preferred[tokens], "expand")(calls, device, cold)

    dispatcher = Dispatcher(CPU, vendors(one, other), timer=timer)
    for tokens in preferred:
        problem = kernels.Problem(tokens, 64, 64, torch.float32, CPU)
        assert dispatcher.product_choice(problem).vendor == preferred[tokens].partition("/")[0]
        check_product(dispatcher, problem)
    given = operands(SQUARE)
    metadata = dispatcher.metadata(given.indices, torch.float32)
    assert metadata is not None and metadata[0] == "other/1"
    one.seen.clear(), other.seen.clear()
    few = Operands(given.x[:4], given.values, given.indices, *metadata)
    torch.testing.assert_close(
        dispatcher.product(few), few.x @ codec.expand(given.values, given.indices, primitives.TWO_FOUR).t()
    )
    # The expanded product, which was second: neither library is asked.
    assert not one.seen and not other.seen
