"""Products of one weight: dense, every 2:4 route with its best algorithm, and what the dispatcher makes of it.

Shape letters: T tokens, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from slope_dist.benchmark import timing
from slope_dist.benchmark.block_linears import TWO_FOUR, Matrix
from slope_dist.benchmark.checking import doubly_kept, require_right
from slope_dist.benchmark.peaks import least_seconds
from slope_dist.planning.gpus import Peaks
from slope_dist.sparse import codec, pruning, reference
from slope_dist.sparse.kernels import Dispatcher, Problem, primitives
from slope_dist.sparse.kernels.candidates import Candidate, Operands

DENSE, DISPATCHER, DERIVED = "dense", "dispatcher", "dispatcher, derived"
REFERENCE, REFERENCE_DERIVED = "reference", "reference, derived"

TOKENS = (1, 8, 16, 32, 128, 512, 2048, 4096, 8192, 16384)
IMPORTANCE = (8192, 2048, 16, 1, 16384, 4096, 512, 128, 32, 8)
"""What is measured first."""

LEAST_TRAINED_TOKENS = 128
"""There is an input gradient in training alone, which never has fewer."""

MOST_DECODED_TOKENS = 32
"""Up to here a product is one of decoding, whose weights come from memory, not from the L2 cache."""

Kind = Literal["forward", "input gradient"]


@dataclass(frozen=True)
class Case:
    """X [T, I] through a weight [O, I], or dY [T, O] back through it."""

    kind: Kind
    tokens: int
    matrix: Matrix
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.matrix.rows} x {self.matrix.columns}, {self.tokens} tokens, {dtype}"

    def row(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            "rows": self.matrix.rows,
            "columns": self.matrix.columns,
            "tensor_ranks": self.matrix.ranks,
            "uses": list(self.matrix.uses),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def problem(self) -> Problem:
        """What a dispatcher is asked for: the input gradient is one over the transpose."""
        rows, columns = self.matrix.rows, self.matrix.columns
        problem = Problem(self.tokens, rows, columns, self.dtype, self.device)
        return problem if self.kind == "forward" else problem.transposed()


def cases(
    matrices: Iterable[Matrix], tokens: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Both products of every weight, the most important first: fewest tensor ranks, then 8192 tokens, then size."""
    order = {count: place for place, count in enumerate(IMPORTANCE)}
    made = [
        Case(kind, count, matrix, dtype, device)
        for matrix in matrices
        for count in tokens
        for kind in ("forward", "input gradient")
        if kind == "forward" or count >= LEAST_TRAINED_TOKENS
    ]

    def importance(case: Case) -> tuple[int, int, int, int]:
        size = case.matrix.rows * case.matrix.columns
        return case.matrix.ranks, order.get(case.tokens, len(order)), -case.tokens, -size

    return iter(sorted(made, key=importance))


def measure(case: Case, dispatcher: Dispatcher | None, seconds: float, peaks: Peaks | None) -> dict[str, Any]:
    """Check every sparse rival, then time all in turns for about `seconds`.

    Args:
        case: the product.
        dispatcher: of the device; None: the reference is the only rival.
        seconds: of timing.
        peaks: of the card, if they are known.

    Raises:
        WrongResultError: a rival is wrong; nothing is timed.
    """
    torch.manual_seed(0)
    rows, columns = case.matrix.rows, case.matrix.columns
    values, indices = primitives.random_matrix(rows, columns, case.dtype, case.device)
    x = torch.randn(case.tokens, columns if case.kind == "forward" else rows, device=case.device).to(case.dtype)
    choice: dict[str, Any] = {}
    if dispatcher is None:
        rivals = _reference_rivals(case, x, values, indices)
    else:
        found = dispatcher.product_choice(case.problem)
        choice = {"label": found.label, "route": found.route, "why": found.why, "rejected": found.rejected}
        rivals = _rivals(case, dispatcher, x, values, indices)
    expected = _expected(case, x, values, indices)
    errors = {name: require_right(str(case), name, run(), expected, x.shape[1]) for name, run in rivals.items()}
    del expected
    # A dense weight has no zeros: products of zeros draw less power, and a card that draws less runs faster.
    weight = torch.randn(rows, columns, device=case.device).to(case.dtype)
    if case.kind == "forward":
        dense: Callable[[], Tensor] = lambda: functional.linear(x, weight)  # noqa: E731
    else:
        dense = lambda: x @ weight  # noqa: E731
    turns = {DENSE: dense, **rivals}
    timed = timing.in_turns(turns, case.device, seconds, flush=case.tokens <= MOST_DECODED_TOKENS)
    numbers: dict[str, dict[str, Any]] = {}
    for name, taken in timed.items():
        numbers[name] = taken.summary()
        numbers[name]["tflops"] = 2e-12 * case.tokens * rows * columns / numbers[name]["seconds"]
        if name in errors:
            numbers[name]["error"] = errors[name]
        if peaks is not None:
            sparse = name != DENSE
            problem = case.problem
            least = least_seconds(peaks, case.tokens, problem.rows, problem.columns, sparse=sparse)
            numbers[name] |= {"bound_seconds": least, "bound_share": least / numbers[name]["seconds"]}
    return case.row() | {"choice": choice, "rivals": numbers}


def _reference_rivals(case: Case, x: Tensor, values: Tensor, indices: Tensor) -> dict[str, Callable[[], Tensor]]:
    if case.kind == "forward":
        return {REFERENCE: lambda: reference.forward(x, values, indices, TWO_FOUR)}
    transposed = pruning.doubly_pruned_transpose(values, indices, TWO_FOUR)
    return {
        REFERENCE: lambda: reference.input_gradient_resident(x, *transposed, TWO_FOUR),
        REFERENCE_DERIVED: lambda: reference.input_gradient(x, values, indices, TWO_FOUR),
    }


def _rivals(
    case: Case, dispatcher: Dispatcher, x: Tensor, values: Tensor, indices: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """The dispatcher, and the fastest right candidate of each route and library, over the weight or its transpose."""
    if case.kind == "input gradient":
        laid, packed, metadata = dispatcher.lay_transpose(values, indices, None)
    else:
        (laid, metadata), packed = dispatcher.lay(values, indices), indices
    operands = Operands(x, laid, packed)
    chosen = Operands(x, laid, packed, *(metadata or ("", None)))
    rivals: dict[str, Callable[[], Tensor]] = {DISPATCHER: lambda: dispatcher.product(chosen)}
    for candidate in _best_of_routes(case.problem, dispatcher):
        given = dispatcher.given(candidate, operands)
        rivals[candidate.label] = lambda run=candidate.run, given=given: run(given)  # type: ignore[misc]
    if case.kind == "input gradient":
        derived = Operands(x, values, indices)
        rivals[DERIVED] = lambda: dispatcher.input_gradient(derived)
    return rivals


def _best_of_routes(problem: Problem, dispatcher: Dispatcher) -> list[Candidate]:
    seconds = dispatcher.product_choice(problem).seconds
    best: dict[tuple[str, str], Candidate] = {}
    right = [candidate for candidate in dispatcher.candidates("product", problem) if candidate.label in seconds]
    for candidate in sorted(right, key=lambda candidate: seconds[candidate.label]):
        best.setdefault((candidate.route, candidate.vendor), candidate)
    return list(best.values())


def _expected(case: Case, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    dense = codec.expand(values, indices, TWO_FOUR).float()
    if case.kind == "forward":
        return x.float() @ dense.t()
    return x.float() @ (dense * doubly_kept(dense.abs(), codec.mask_of(indices, TWO_FOUR)))
