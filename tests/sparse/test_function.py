"""The sparse product's output and all its gradients equal a dense oracle, in every dtype and shape, frozen or not.

The oracle masks a dense weight with loops and multiplies in fp64 (tests/sparse/oracle.py). Its results are compared by
relative norm, within the rounding of one result for each dtype.

Run: pytest tests/sparse/test_function.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.sparse.function import sparse_product
from tests.sparse import oracle
from tests.sparse.oracle import gradient

pytestmark = pytest.mark.usefixtures("nan_scratch")

OUT, IN = 24, 40
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = tuple(BOUNDS)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected))


class Case:
    """A dense weight with its masks by the oracle, and the same weight compressed."""

    def __init__(self, dense: Tensor, n: int = 2, m: int = 4, held: Tensor | None = None) -> None:
        self.dense = dense
        self.pattern = Pattern(n, m)
        self.kept = oracle.row_mask(dense, n, m)
        self.doubly_kept = oracle.column_mask(dense, self.kept, n, m) if held is None else held
        self.matrix = CompressedMatrix.prune(dense, self.pattern)
        self.held = None if held is None else codec.pack_bits(held)

    def values(self) -> Tensor:
        return self.matrix.values.clone().requires_grad_()

    def run(self, x: Tensor, values: Tensor, *, resident: bool = False) -> Tensor:
        transpose = None
        if resident:
            kept = None if self.held is None else codec.unpack_bits(self.held)
            transpose = pruning.doubly_pruned_transpose(values.detach(), self.matrix.indices, self.pattern, kept)
        return sparse_product(x, values, self.matrix.indices, self.pattern, column_mask=self.held, transpose=transpose)

    def expected(self, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat_x, flat_grad = x.detach().double().reshape(-1, IN), grad_y.double().reshape(-1, OUT)
        y, grad_x, grad_values = oracle.products(flat_x, self.dense.double(), self.kept, self.doubly_kept, flat_grad)
        return y.view(*x.shape[:-1], OUT), grad_x.view(x.shape), grad_values

    def check(self, x: Tensor, grad_y: Tensor, *, resident: bool = False) -> None:
        """Forward and backward from leaf `x`, against the oracle."""
        values = self.values()
        y = self.run(x, values, resident=resident)
        y.backward(grad_y)
        bound = BOUNDS[self.dense.dtype]
        assert y.dtype == gradient(x).dtype == gradient(values).dtype == self.dense.dtype
        assert gradient(values).shape == values.shape
        for actual, expected in zip((y, gradient(x), gradient(values)), self.expected(x, grad_y), strict=True):
            assert relative_error(actual, expected) < bound


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
def test_outputs_and_all_gradients(n: int, m: int, dtype: torch.dtype, resident: bool) -> None:
    case = Case(torch.randn(OUT, IN).to(dtype), n, m)
    case.check(leaf(17, IN, dtype=dtype), torch.randn(17, OUT).to(dtype), resident=resident)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (3,), (63,), (3, 21), (1, 7), (5, 1, 3), (2, 3, 2)], ids=str)
def test_token_counts_and_dimensions(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(torch.randn(OUT, IN).to(dtype))
    case.check(leaf(*leading, IN, dtype=dtype), torch.randn(*leading, OUT).to(dtype))


def test_no_tokens_give_an_empty_output_and_zero_gradients() -> None:
    case, x = Case(torch.randn(OUT, IN)), torch.zeros(0, IN, requires_grad=True)
    values = case.values()
    y = case.run(x, values)
    y.sum().backward()
    assert y.shape == (0, OUT) and gradient(x).shape == (0, IN)
    assert gradient(values).shape == values.shape and not gradient(values).any()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second token": lambda base: base[::2],
    "permuted": lambda base: base.transpose(0, 1),
    "features first": lambda base: base.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of features": lambda base: torch.cat([base, base], dim=2)[..., 3 : 3 + IN],
    "expanded": lambda base: base[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_inputs_that_are_not_contiguous(name: str) -> None:
    case, base = Case(torch.randn(OUT, IN, dtype=torch.float64)), leaf(4, 7, IN)
    x = VIEWS[name](base)
    assert not x.is_contiguous()
    x.retain_grad()
    case.check(x, torch.randn(*x.shape[:-1], OUT, dtype=torch.float64))


def test_output_gradients_that_are_not_contiguous() -> None:
    case = Case(torch.randn(OUT, IN, dtype=torch.float64))
    one_for_all = torch.randn((), dtype=torch.float64).expand(4, 7, OUT)
    permuted = torch.randn(OUT, 7, 4, dtype=torch.float64).permute(2, 1, 0)
    for grad_y in (one_for_all, permuted):
        assert not grad_y.is_contiguous()
        case.check(leaf(4, 7, IN), grad_y)


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("kind", ["ties", "equal", "signed zeros"])
def test_ties_and_kept_zeros(kind: str, resident: bool) -> None:
    dense = oracle.difficult_matrix(kind, OUT, IN, torch.float64)
    Case(dense).check(leaf(9, IN), torch.randn(9, OUT, dtype=torch.float64), resident=resident)


def test_kept_zeros_receive_their_gradient() -> None:
    case = Case(oracle.difficult_matrix("zeros", OUT, IN, torch.float64))
    x, grad_y = leaf(9, IN), torch.randn(9, OUT, dtype=torch.float64)
    values = case.values()
    y = case.run(x, values)
    y.backward(grad_y)
    assert not y.any() and not gradient(x).any()
    assert relative_error(gradient(values), case.expected(x, grad_y)[2]) < 1e-14


def test_frozen_weight_or_input() -> None:
    case, grad_y = Case(torch.randn(OUT, IN, dtype=torch.float64)), torch.randn(5, OUT, dtype=torch.float64)
    x = leaf(5, IN)
    _, grad_x, grad_values = case.expected(x, grad_y)

    frozen_values = case.values().detach()
    case.run(x, frozen_values).backward(grad_y)
    assert frozen_values.grad is None and relative_error(gradient(x), grad_x) < 1e-14

    values, frozen_x = case.values(), x.detach()
    case.run(frozen_x, values).backward(grad_y)
    assert frozen_x.grad is None and relative_error(gradient(values), grad_values) < 1e-14

    assert not case.run(frozen_x, frozen_values).requires_grad


def test_gradients_accumulate_over_two_uses() -> None:
    case, grad_y = Case(torch.randn(OUT, IN, dtype=torch.float64)), torch.randn(5, OUT, dtype=torch.float64)
    values, inputs = case.values(), [leaf(5, IN), leaf(5, IN)]
    for x in inputs:
        case.run(x, values).backward(grad_y)
    expected = torch.stack([case.expected(x, grad_y)[2] for x in inputs]).sum(0)
    assert relative_error(gradient(values), expected) < 1e-14


@pytest.mark.parametrize("held", [False, True], ids=["by magnitude", "held mask"])
@pytest.mark.parametrize("kind", ["random", "ties", "signed zeros"])
def test_resident_and_derived_give_the_same_numbers(kind: str, held: bool) -> None:
    # Whole numbers: sums are exact, so the two orders of summation must agree to the last bit.
    dense = (oracle.difficult_matrix(kind, OUT, IN) * 8).round()
    kept = oracle.row_mask(dense, 2, 4)
    case = Case(dense, held=oracle.column_mask(torch.randn(OUT, IN), kept, 2, 4) if held else None)
    results = []
    for resident in (False, True):
        torch.manual_seed(0)
        x = torch.randint(-8, 9, (11, IN)).float().requires_grad_()
        values = case.values()
        y = case.run(x, values, resident=resident)
        y.backward(torch.randint(-8, 9, (11, OUT)).float())
        results.append((y, gradient(x), gradient(values)))
    for derived, resident in zip(*results, strict=True):
        assert derived.equal(resident)


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
def test_a_held_column_mask_rules_the_input_gradient_alone(resident: bool) -> None:
    dense = torch.randn(OUT, IN, dtype=torch.float64)
    held = oracle.column_mask(torch.randn(OUT, IN), oracle.row_mask(dense, 2, 4), 2, 4)
    case, by_magnitude = Case(dense, held=held), Case(dense)
    x, grad_y = leaf(9, IN), torch.randn(9, OUT, dtype=torch.float64)
    case.check(x, grad_y, resident=resident)
    ours, other = case.expected(x, grad_y), by_magnitude.expected(x, grad_y)
    assert ours[0].equal(other[0]) and ours[2].equal(other[2])
    assert relative_error(ours[1], other[1]) > 0.1


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor hooks", "reentrant"])
def test_recomputation_changes_no_bit(use_reentrant: bool, resident: bool) -> None:
    case, start = Case(torch.randn(OUT, IN)), leaf(7, IN, dtype=torch.float32)
    square = Case(torch.randn(OUT, IN)[:, :OUT])

    def network(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return square.run(case.run(x, first, resident=resident).relu(), second, resident=resident)

    results = []
    for recompute in (False, True):
        x, first, second = start.detach().clone().requires_grad_(), case.values(), square.values()
        if recompute:
            y = checkpoint(network, x, first, second, use_reentrant=use_reentrant)
        else:
            y = network(x, first, second)
        y.square().sum().backward()
        results.append((y.detach(), gradient(x), gradient(first), gradient(second)))
    for plain, recomputed in zip(*results, strict=True):
        assert oracle.same_bits(plain, recomputed)


def lossless_weight() -> Tensor:
    """[24, 40] whose 2:4 mask is a checkerboard of pairs: two in every column group, so nothing more to prune."""
    rows, columns = torch.arange(OUT).view(-1, 1), torch.arange(IN).view(1, -1)
    large = (rows % 2) == (columns % 4 // 2)
    return (torch.rand(OUT, IN, dtype=torch.float64) + 0.5) * torch.where(large, 4.0, 0.1)


@pytest.mark.parametrize(("n", "m"), oracle.PATTERNS)
def test_the_gradient_of_values_is_exact_for_any_weight(n: int, m: int) -> None:
    case, x = Case(torch.randn(OUT, IN, dtype=torch.float64), n, m), leaf(3, IN).detach()
    assert torch.autograd.gradcheck(lambda values: case.run(x, values), case.values())


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
def test_all_gradients_are_exact_where_the_second_pruning_removes_nothing(resident: bool) -> None:
    case = Case(lossless_weight())
    assert case.doubly_kept.equal(case.kept)
    assert torch.autograd.gradcheck(
        lambda x, values: case.run(x, values, resident=resident), (leaf(3, IN), case.values())
    )


def test_elsewhere_the_input_gradient_is_that_of_the_doubly_pruned_weight_and_not_the_derivative() -> None:
    case, x = Case(torch.randn(OUT, IN, dtype=torch.float64)), leaf(3, IN)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x: case.run(x, case.matrix.values), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: case.run(x, case.matrix.values), x.detach()[0])
    zero = torch.zeros((), dtype=torch.float64)
    assert jacobian.equal(torch.where(case.doubly_kept, case.dense, zero))
    assert not jacobian.equal(torch.where(case.kept, case.dense, zero))


def test_a_second_derivative_is_refused() -> None:
    case, x = Case(torch.randn(OUT, IN, dtype=torch.float64)), leaf(3, IN)
    values = case.values()
    (grad_x,) = torch.autograd.grad(case.run(x, values).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


@pytest.mark.parametrize("where", ["values", "input"])
def test_changing_what_backward_needs_is_noticed(where: str) -> None:
    case, x = Case(torch.randn(OUT, IN, dtype=torch.float64)), leaf(3, IN)
    values, doubled = case.values(), x * 2
    y = case.run(doubled, values)
    with torch.no_grad():
        (values if where == "values" else doubled).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_kept_for_backward_is_compressed() -> None:
    case, x = Case(torch.randn(OUT, IN)), leaf(3, IN, dtype=torch.float32)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.run(x, case.values())
    assert sorted(tensor.numel() for tensor in saved) == sorted([3 * IN, OUT * IN // 2, OUT * IN // 8])
