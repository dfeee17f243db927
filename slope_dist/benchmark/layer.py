"""One linear layer, forward and backward: 2:4 with derived and with resident transpose, beside `torch.nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from slope_dist.benchmark import memory, timing
from slope_dist.benchmark.checking import doubly_kept, largest_two, require_right
from slope_dist.layers import Linear
from slope_dist.sparse import CompressedMatrix, Pattern, SparseWeight

DENSE, DERIVED, RESIDENT = "dense", "derived", "resident"
RIVALS = (DENSE, DERIVED, RESIDENT)

CHECKED_TOKENS = 64

TWO_FOUR = Pattern(2, 4)


@dataclass(frozen=True)
class Case:
    """X [T, I] through a weight [O, I]."""

    tokens: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.in_features} -> {self.out_features}, {dtype}, {self.tokens} tokens"

    def row(self) -> dict[str, object]:
        """Plain data for a report."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}

    def normal(self, *shape: int) -> Tensor:
        """Random normals of the case's dtype and device."""
        return torch.randn(*shape, device=self.device).to(self.dtype)


def cases(
    widths: Sequence[int], projections: Sequence[int], tokens: int, dtypes: Sequence[torch.dtype], device: torch.device
) -> Iterator[Case]:
    """Square layers of `widths`, then for each of `projections` those up to and down from four times its width."""
    shapes = [(width, width) for width in widths]
    shapes += [shape for width in projections for shape in ((width, 4 * width), (4 * width, width))]
    for dtype in dtypes:
        for in_features, out_features in shapes:
            yield Case(tokens, in_features, out_features, dtype, device)


def sparse_layer(case: Case, rival: str, dense: Tensor) -> tuple[Linear, SparseWeight]:
    """The layer of a sparse rival and its weight, pruned from `dense` [O, I]."""
    weight = SparseWeight(CompressedMatrix.prune(dense, TWO_FOUR), resident_transpose=rival == RESIDENT)
    return Linear("layer", weight, bias=True, split="column").to(case.device, case.dtype), weight


def stepper(case: Case, rival: str, tokens: int | None = None) -> Callable[[], None]:
    """One training step of a rival, but for the optimizer: forward, all gradients, derived caches dropped.

    A resident transpose is therefore rebuilt in every step, as it is where each step has one micro-batch.
    """
    layer, values_changed = _build(case, rival)
    x = case.normal(tokens or case.tokens, case.in_features).requires_grad_()
    grad_y = case.normal(tokens or case.tokens, case.out_features)

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(grad_y)
        values_changed()

    return step


def _build(case: Case, rival: str) -> tuple[nn.Module, Callable[[], None]]:
    if rival == DENSE:
        return nn.Linear(case.in_features, case.out_features, device=case.device, dtype=case.dtype), lambda: None
    layer, weight = sparse_layer(case, rival, case.normal(case.out_features, case.in_features))
    return layer, weight.values_changed


def held_bytes(case: Case, rival: str) -> int:
    """Bytes of a rival's parameters and buffers (a resident transpose is part of a step's peak)."""
    layer, _ = _build(case, rival)
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


def peak_bytes(case: Case, rival: str) -> int:
    """Measured peak of one step above weights, input and output gradient; see `memory.peak_of` for when to call it."""

    def prepare() -> Callable[[], None]:
        # What libraries allocate once is not the layer's.
        stepper(case, rival, tokens=8)()
        return stepper(case, rival)

    return memory.peak_of(prepare, case.device)


def check(case: Case, rival: str) -> dict[str, float]:
    """Relative errors of a sparse rival's output and gradients against dense masked products in fp32.

    The masks are made anew here, by sorting.

    Raises:
        WrongResultError: one is above the bound of the dtype.
    """
    dense = case.normal(case.out_features, case.in_features)
    layer, weight = sparse_layer(case, rival, dense)
    x = case.normal(CHECKED_TOKENS, case.in_features).requires_grad_()
    grad_y = case.normal(CHECKED_TOKENS, case.out_features)
    y = layer(x)
    y.backward(grad_y)

    magnitudes = dense.float().abs()
    kept = largest_two(magnitudes)
    w, x32, g32 = dense.float(), x.detach().float(), grad_y.float()
    found = {"output": y, "input_gradient": x.grad, "weight_gradient": weight.values.grad}
    expected = {
        "output": x32 @ (w * kept).t(),
        "input_gradient": g32 @ (w * doubly_kept(magnitudes, kept)),
        "weight_gradient": (g32.t() @ x32)[kept].view_as(weight.values),
    }
    what = f"{case}, {rival}"
    terms = {"output": case.in_features, "input_gradient": case.out_features, "weight_gradient": CHECKED_TOKENS}
    return {name: require_right(what, name, found[name], expected[name], terms[name]) for name in expected}


def measure_memory(case: Case) -> dict[str, int]:
    """Measured peak of one step for every rival, in bytes; empty where this machine cannot tell."""
    if not memory.can_measure(case.device):
        return {}
    return {rival: peak_bytes(case, rival) for rival in RIVALS}


def measure_time(case: Case, seconds: float) -> dict[str, dict[str, float]]:
    """Check the sparse rivals, then time all in turns for about `seconds`.

    Returns:
        for every rival the summary of its timing, the bytes it holds between steps and, if sparse, its errors.

    Raises:
        WrongResultError: a sparse rival is wrong; nothing is timed.
    """
    errors = {rival: check(case, rival) for rival in RIVALS if rival != DENSE}
    timings = timing.in_turns({rival: stepper(case, rival) for rival in RIVALS}, case.device, seconds)
    return {
        rival: timings[rival].summary()
        | {"held_bytes": held_bytes(case, rival)}
        | {f"{name}_error": error for name, error in errors.get(rival, {}).items()}
        for rival in RIVALS
    }
