"""AdamW that writes both copies: `torch.optim.AdamW` over the kept entries, and the doubly pruned transpose, exactly.

Run: pytest tests/sparse/kernels/jit/test_adamw.py
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.sparse.kernels.jit.adamw import adamw_step
from slope_dist.sparse.reference_adamw import adamw_step_reference
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.oracle import KINDS, difficult_matrix, same_bits

PATTERN = Pattern(2, 4)
NUMBERS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ULP = torch.finfo(torch.float32).eps
LIVE = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(8, 8), (40, 72), (136, 136)]
"""One tile; a part of a program; a little more than a program in each direction."""

pytestmark = pytest.mark.usefixtures("nan_scratch")
on_devices = pytest.mark.parametrize("device", DEVICES)
updates = pytest.mark.parametrize("update", [adamw_step, adamw_step_reference], ids=["kernel", "twin"])


@dataclass
class State:
    """A compressed weight with its optimizer state and both copies."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    indices: Tensor
    values: Tensor
    transposed: tuple[Tensor, Tensor]

    def clone(self) -> State:
        parts = [t.clone() for t in (self.master, self.exp_avg, self.exp_avg_sq, self.indices, self.values)]
        return State(*parts, tuple(t.clone() for t in self.transposed))

    def step(self, update, grad: Tensor, *, column_mask: Tensor | None = None, transpose: bool = True, **numbers):
        update(
            *(self.master, self.exp_avg, self.exp_avg_sq, grad, self.indices, self.values),
            self.transposed if transpose else None,
            column_mask=column_mask,
            **{**NUMBERS, "step": 1, **numbers},
        )


def state_of(dense: Tensor, live: torch.dtype, device: str) -> State:
    """Zero moments; copies that nothing has been written to."""
    matrix = CompressedMatrix.prune(dense, PATTERN)
    (rows, columns), master = dense.shape, matrix.values.to(device)
    empty = partial(torch.empty, device=device)
    values = master if live == torch.float32 else empty(master.shape, dtype=live)
    transposed = empty(columns, rows // 2, dtype=live), empty(columns, rows // 8, dtype=torch.uint8)
    moments = torch.zeros_like(master), torch.zeros_like(master)
    return State(master, *moments, matrix.indices.to(device), values, transposed)


def assert_transposed(state: State, kept: Tensor | None = None) -> None:
    """The transpose is that of the live copy, to the bit."""
    made = pruning.doubly_pruned_transpose(state.values, state.indices, PATTERN, kept)
    assert same_bits(state.transposed[0], made[0]) and same_bits(state.transposed[1], made[1])


def distance(actual: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """Largest difference, in units of the fp32 epsilon of the larger of `expected` and `size`."""
    scale = expected.abs() if size is None else torch.maximum(expected.abs(), size.abs())
    return float(((actual - expected).abs() / scale.clamp(min=1e-30)).max()) / ULP


@on_devices
@updates
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("step", "beta2"), [(1, 0.999), (7, 0.95)])
def test_one_step_is_torchs_within_a_few_ulp(step: int, beta2: float, dtype: torch.dtype, update, device: str) -> None:
    """Four at most, of the larger number that is mixed or added; the twin on a CPU is torch's to the bit."""
    state = state_of(torch.randn(40, 72), torch.float32, device)
    if step == 1:
        # Nothing for an error of the update to hide behind.
        state.master.zero_()
    state.exp_avg.normal_()
    state.exp_avg_sq.uniform_()
    grad = torch.randn(state.master.shape).to(device, dtype)
    parameter = torch.nn.Parameter(state.master.clone())
    parameter.grad = grad.float() * 0.5
    numbers = {**NUMBERS, "betas": (0.9, beta2)}
    optimizer = torch.optim.AdamW([parameter], **numbers, foreach=False)
    moments = {"exp_avg": state.exp_avg.clone(), "exp_avg_sq": state.exp_avg_sq.clone()}
    optimizer.state[parameter] = {"step": torch.tensor(step - 1.0), **moments}
    optimizer.step()

    before = state.exp_avg.clone()
    state.step(update, grad, **{**numbers, "step": step, "grad_scale": 0.5})
    mixed = torch.maximum(before.abs(), parameter.grad.abs())
    denominator = (moments["exp_avg_sq"] / (1 - beta2**step)).sqrt() + 1e-8
    added = NUMBERS["lr"] / (1 - 0.9**step) * mixed / denominator
    bound = 0 if update is adamw_step_reference and device == "cpu" else 4
    assert distance(state.exp_avg, moments["exp_avg"], mixed) <= bound
    assert distance(state.exp_avg_sq, moments["exp_avg_sq"]) <= bound
    assert distance(state.master, parameter.detach(), added) <= bound


@on_devices
@updates
@pytest.mark.parametrize(("betas", "steps"), [((0.9, 0.999), 200), ((0.3, 0.5), 20), ((0.0, 0.0), 20)], ids=str)
def test_many_steps_are_torchs(betas: tuple[float, float], steps: int, update, device: str) -> None:
    """The weights of the two runs part by less than a ten thousandth of what training moves them."""
    state = state_of(torch.randn(24, 40), torch.float32, device)
    initial = state.master.clone()
    parameter = torch.nn.Parameter(state.master.clone())
    numbers = {**NUMBERS, "betas": betas}
    optimizer = torch.optim.AdamW([parameter], **numbers, foreach=False)
    for step in range(1, steps + 1):
        # A gradient with a direction and noise, at weights that each run has of its own.
        noise = torch.randn(initial.shape).to(device)
        optimizer.param_groups[0]["lr"] = lr = NUMBERS["lr"] * min(1, step / 20)
        parameter.grad = parameter.detach() - 1 + noise
        optimizer.step()
        gradient = state.master - 1 + noise
        state.step(update, gradient, transpose=step == steps, **{**numbers, "lr": lr, "step": step})
    moved = torch.linalg.vector_norm(parameter.detach() - initial)
    assert moved > 0.5
    assert torch.linalg.vector_norm(state.master - parameter.detach()) < 1e-4 * moved
    assert_transposed(state)


@on_devices
@updates
@pytest.mark.parametrize("held", [False, True], ids=["by magnitude", "held mask"])
@pytest.mark.parametrize("live", LIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_copies_are_those_of_the_rounded_weight(
    shape: tuple[int, int], live: torch.dtype, held: bool, update, device: str
) -> None:
    state = state_of(torch.randn(shape), live, device)
    old = pruning.column_mask(state.master, state.indices, PATTERN)
    if held:
        # As a mask of long ago: what it keeps may be any part of what is kept.
        old &= torch.rand(shape).to(device) < 0.8
    mask = codec.pack_bits(old) if held else None
    # Large steps: the mask by magnitude moves.
    state.step(update, torch.randn(state.master.shape).to(device), lr=0.7, column_mask=mask)
    assert same_bits(state.values, state.master.to(live))
    assert_transposed(state, old if held else None)
    if not held and shape != (8, 8):
        assert not torch.equal(old, pruning.column_mask(state.values, state.indices, PATTERN))


@on_devices
@pytest.mark.parametrize("live", LIVE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ties_zeros_and_not_finite_weights(kind: str, live: torch.dtype, device: str) -> None:
    """Without decay and gradient the weight stays as it is, to the sign of a zero: what competes is known."""
    dense = difficult_matrix(kind, 48, 64)
    # Half way between two bf16: to even.
    dense[1] = 1 + torch.arange(64) / 256
    dense[5, 3], dense[6, 3], dense[9, 7], dense[10, 7] = float("nan"), float("inf"), -float("inf"), -float("nan")
    state = state_of(dense, live, device)
    before = state.master.clone()
    state.step(adamw_step, torch.zeros_like(before), weight_decay=0.0)
    for actual, expected in ((state.master, before), (state.values, before.to(live))):
        assert same_bits(torch.nan_to_num(actual, nan=7.0), torch.nan_to_num(expected, nan=7.0))
    assert_transposed(state)


@on_devices
def test_scalars_may_stay_on_the_device(device: str) -> None:
    one = state_of(torch.randn(16, 24), torch.float16, device)
    two = one.clone()
    grad = torch.randn(one.master.shape).to(device)
    one.step(adamw_step, grad, step=3, grad_scale=0.25)
    on_device = {"step": torch.tensor(3.0, device=device), "grad_scale": torch.tensor(0.25, device=device)}
    two.step(adamw_step, grad, **on_device)
    for left, right in zip((one.master, *one.transposed), (two.master, *two.transposed), strict=True):
        assert same_bits(left, right)


@on_devices
@updates
def test_without_a_transpose_the_rest_is_the_same(update, device: str) -> None:
    one = state_of(torch.randn(16, 24), torch.float16, device)
    two, untouched = one.clone(), one.clone()
    grad = torch.randn(one.master.shape).to(device)
    one.step(update, grad)
    two.step(update, grad, transpose=False)
    for name in ("master", "exp_avg", "exp_avg_sq", "values"):
        assert same_bits(getattr(one, name), getattr(two, name))
    assert same_bits(two.transposed[0], untouched.transposed[0]) and same_bits(
        two.transposed[1], untouched.transposed[1]
    )
