"""A weight gives the reference's outputs and gradients whatever computes its products, compiled or not.

(By Triton's kernels as well: tests/sparse/kernels/test_by_triton.py.)

Every gradient counts: of the input, the values, the bias and what is added in the product. The routes are those that a
CPU has (expand, decode, a vendor of plain torch), so what is shown is the way from a layer through the operators to a
route and back, not a library.

Run: pytest tests/sparse/kernels/test_products.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slope_dist.layers.linear import Linear, LowRankAdapter
from slope_dist.sparse import CompressedMatrix, Pattern, SparseWeight, codec, kernels
from slope_dist.sparse.kernels import ops, primitives
from slope_dist.sparse.kernels.dispatch import Arrangement, Dispatcher
from tests.sparse.kernels.vendors import PlainVendor, preferring, vendors

pytestmark = pytest.mark.usefixtures("plain_primitives")
CPU = torch.device("cpu")
TOKENS, OUT, IN, RANK = 24, 64, 32, 4
ROUTES = ("expand", "plain/1", "plain/2", "transpose")


def layer(*, resident: bool = False, held: bool = False, adapter: bool = True) -> Linear:
    torch.manual_seed(1)
    matrix = CompressedMatrix.prune(torch.randn(OUT, IN), Pattern(2, 4))
    weight = SparseWeight(matrix, resident_transpose=resident, hold_column_mask=held)
    factor = LowRankAdapter(torch.randn(RANK, IN), OUT, split="column") if adapter else None
    made = Linear("layer", weight, bias=True, split="column", adapter=factor)
    with torch.no_grad():
        assert made.bias is not None
        made.bias.normal_()
        if factor is not None:
            factor.up.normal_()
    return made


def step(made: Linear, compiled: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(2, TOKENS // 2, IN, requires_grad=True)
    y = (torch.compile(made, fullgraph=True, backend="aot_eager") if compiled else made)(x)
    made.zero_grad()
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    assert len(found) == 2 + len(list(made.parameters()))
    return found


def dispatcher(route: str, arrangement: Arrangement = "kept") -> Dispatcher:
    return Dispatcher(CPU, vendors(PlainVendor()), timer=preferring(route, "plain"), arrangement=arrangement)


@pytest.mark.parametrize("arrangement", ["in place", "kept", "derived"])
@pytest.mark.parametrize("held", [False, True], ids=["by magnitude", "held"])
@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("route", ROUTES)
def test_outputs_and_all_gradients(route: str, resident: bool, held: bool, arrangement: Arrangement) -> None:
    made = layer(resident=resident, held=held)
    expected = step(made)
    made.weight.values_changed()  # type: ignore[attr-defined]
    chosen = dispatcher(route, arrangement)
    with kernels.using(chosen):
        # Twice: the first measures.
        step(made)
        made.weight.prepare_kernels()  # type: ignore[attr-defined]
        found = step(made)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    labels = [entry["label"] for entry in chosen.as_data().values()]
    assert any(route in label for label in labels) or (route == "transpose" and resident)


@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
@pytest.mark.parametrize("route", ROUTES)
def test_compiled_whole_it_is_the_same(route: str, resident: bool) -> None:
    made = layer(resident=resident)
    with kernels.using(dispatcher(route)):
        expected = step(made)
        made.weight.values_changed()  # type: ignore[attr-defined]
        found = step(made, compiled=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("route", ["expand", "plain/1"])
def test_without_gradients(route: str, tokens: int, adapter: bool) -> None:
    made = layer(adapter=adapter)
    x = torch.randn(tokens, IN)
    with torch.inference_mode():
        expected = made(x)
        with kernels.using(dispatcher(route)):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)


def test_a_model_on_another_device_than_the_dispatchers_is_computed_by_the_reference() -> None:
    made, x = layer(), torch.randn(5, IN)
    elsewhere = Dispatcher(torch.device("cuda", 7))
    with torch.inference_mode():
        expected = made(x)
        with kernels.using(elsewhere):
            assert made(x).equal(expected)


def test_in_place_a_weight_and_its_metadata_are_one_buffer_of_ten_bits_an_element() -> None:
    weight = layer(adapter=False).weight.bfloat16()
    assert isinstance(weight, SparseWeight)
    with kernels.using(dispatcher("plain/1", "in place")):
        kernels.active().product_choice(kernels.Problem(8, OUT, IN, torch.bfloat16, CPU))  # type: ignore[union-attr]
        before = weight.values.detach().clone()
        weight.prepare_kernels()
        assert weight.values.equal(before)
        (metadata,) = weight.cached_tensors()
        assert metadata.data_ptr() == weight.values.data_ptr() + weight.values.nbytes
        bits = 8 * (weight.values.nbytes + weight.indices.nbytes + metadata.nbytes) / (OUT * IN)
        assert bits == 10
        # An optimizer goes on writing where the library reads.
        with torch.no_grad():
            weight.values.mul_(2)
            dense = codec.expand(weight.values.detach(), weight.indices, Pattern(2, 4))
            x = torch.randn(8, IN).bfloat16()
            torch.testing.assert_close(weight(x), x @ dense.t())


def test_resident_transposes_and_vendors_metadata_make_twenty_bits_an_element() -> None:
    weight = layer(adapter=False, resident=True).weight.bfloat16()
    assert isinstance(weight, SparseWeight)
    with kernels.using(dispatcher("plain/1")):
        for shape in ((OUT, IN), (IN, OUT)):
            kernels.active().product_choice(kernels.Problem(8, *shape, torch.bfloat16, CPU))  # type: ignore[union-attr]
        weight.prepare_kernels()
        weight(torch.randn(8, IN).bfloat16()).sum().backward()
        held = [weight.values, weight.indices, *weight.cached_tensors()]
        assert 8 * sum(tensor.nbytes for tensor in held) / (OUT * IN) == 20


def test_new_indices_make_new_metadata() -> None:
    made = layer(adapter=False)
    weight = made.weight
    assert isinstance(weight, SparseWeight)
    with kernels.using(dispatcher("plain/1")):
        step(made)
        step(made)
        other = CompressedMatrix.prune(torch.randn(OUT, IN), Pattern(2, 4))
        with torch.no_grad():
            weight.values.copy_(other.values)
            weight.indices.copy_(other.indices)
        weight.indices_changed()
        found = step(made)
    for name, value in step(made).items():
        torch.testing.assert_close(found[name], value)


def test_a_gradient_too_large_for_one_piece_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, indices = primitives.random_matrix(1000, 32, torch.float32, CPU)
    grad_y, x = torch.randn(6, 1000), torch.randn(6, 32)
    whole = ops.weight_gradient(grad_y, x, indices)
    monkeypatch.setattr(ops, "LARGEST_GRADIENT", 300 * 32)
    assert ops.gradient_rows(1000, 32) == 256
    torch.testing.assert_close(ops.weight_gradient(grad_y, x, indices), whole)


@pytest.mark.parametrize("name", ["product", "product_with_adapter", "input_gradient", "weight_gradient", "transpose"])
def test_operators_say_their_shapes_rightly(name: str) -> None:
    values, indices = primitives.random_matrix(OUT, IN, torch.float32, CPU)
    x, y, mask = torch.randn(TOKENS, IN), torch.randn(TOKENS, OUT), torch.zeros_like(indices)
    bias, down, up = torch.randn(OUT), torch.randn(RANK, IN), torch.randn(OUT, RANK)
    arguments: dict[str, tuple] = {
        "product": (x, values, indices, "", None, bias, y),
        "product_with_adapter": (x, values, indices, "", None, bias, down, up, 0.25),
        "input_gradient": (y, values, indices, mask),
        "weight_gradient": (y, x, indices),
        "transpose": (values, indices, mask),
    }
    with kernels.using(dispatcher("expand")):
        torch.library.opcheck(
            getattr(torch.ops.slope_dist, name), arguments[name], test_utils=("test_schema", "test_faketensor")
        )


def test_tensors_elsewhere_than_the_dispatchers_device_take_the_reference() -> None:
    made = layer()
    expected = step(made)
    with kernels.using(Dispatcher(torch.device("meta"))):
        found = step(made)
    assert all(found[name].equal(value) for name, value in expected.items())
