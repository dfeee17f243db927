"""Layers, compilers, CUDA graphs, determinism, memory and the optimizer by the kernels that a machine has.

What plain torch gives on the CPU in fp64 is the reference. The same bodies run on a CPU, with the stand-in for
cuSPARSELt, "aot_eager" for inductor and a repeated call for a graph; only with a GPU do they say anything of a card.
Scratch memory is full of NaN.

Run: pytest tests/sparse/kernels/test_on_gpu.py -rs
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from slope_dist.engine.optimizer import AdamW, OptimizerSettings
from slope_dist.layers.linear import Linear, LowRankAdapter
from slope_dist.sparse import CompressedMatrix, Pattern, SparseWeight, kernels, pruning
from slope_dist.sparse.kernels import dispatch, measuring, primitives
from slope_dist.sparse.kernels.dispatch import Arrangement, Dispatcher
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.kernels.found import VENDORS, device_of, leave_out_interpreter, need
from tests.sparse.kernels.vendors import preferring
from tests.sparse.oracle import same_bits

pytestmark = pytest.mark.usefixtures("nan_scratch")

on_devices = pytest.mark.parametrize("device", DEVICES)
TOKENS, OUT, IN, RANK = 52, 192, 64, 8
TWO_FOUR = Pattern(2, 4)
ROUTES = ("expand", *(f"{vendor}/{tiles}" for vendor in VENDORS for tiles in (1, 3)))
WHOLE = ("expand", *(f"{vendor}/1" for vendor in VENDORS))


def layer(dtype: torch.dtype, *, resident: bool, held: bool = False, adapter: bool = True) -> Linear:
    torch.manual_seed(1)
    matrix = CompressedMatrix.prune(torch.randn(OUT, IN).to(dtype), TWO_FOUR)
    weight = SparseWeight(matrix, resident_transpose=resident, hold_column_mask=held)
    factor = LowRankAdapter(torch.randn(RANK, IN), OUT, split="column") if adapter else None
    made = Linear("layer", weight, bias=True, split="column", adapter=factor)
    with torch.no_grad():
        assert made.bias is not None
        made.bias.normal_()
        if factor is not None:
            factor.up.normal_()
    return made.to(dtype)


def step(made: Linear, run: Callable[[Tensor], Tensor] | None = None, seed: int = 2) -> dict[str, Tensor]:
    """Output and every gradient, of the same rounded numbers whatever device and dtype."""
    assert made.bias is not None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, TOKENS // 2, IN, generator=generator).bfloat16().to(made.bias).requires_grad_()
    y = (made if run is None else run)(x)
    made.zero_grad()
    y.backward(torch.randn(y.shape, generator=generator).bfloat16().to(y))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    assert len(found) == 2 + len(list(made.parameters()))
    return found


def far(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """What is further from the expected than its dtype allows."""
    off = {}
    for name, value in expected.items():
        error = torch.linalg.vector_norm(found[name].cpu().double() - value.cpu().double())
        ratio = float(error / torch.linalg.vector_norm(value.double()))
        # Not `ratio > bound`: NaN must not pass.
        if not ratio <= measuring.bound(found[name].dtype, max(IN, OUT)):
            off[name] = f"off by {ratio:.1e}"
    return off


def sparse(made: Linear) -> SparseWeight:
    assert isinstance(made.weight, SparseWeight)
    return made.weight


def change(made: Linear) -> None:
    """As an optimizer does, which writes where a library reads; what was derived is stale then."""
    sparse(made).values.data.mul_(-0.5)
    sparse(made).values_changed()


def dispatcher_of(device: str, route: str, **options) -> Dispatcher:
    return Dispatcher(device_of(device), need(device, route), timer=preferring(route), **options)


@on_devices
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
def test_a_layer_gives_all_that_plain_torch_gives(
    resident: bool, dtype: torch.dtype, route: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_interpreter(monkeypatch, device)
    arrangements: tuple[Arrangement, ...] = ("in place", "kept", "derived")
    for arrangement in arrangements:
        for held in (False, True):
            reference = layer(dtype, resident=resident, held=held)
            made = copy.deepcopy(reference).to(device_of(device))
            expected = [step(reference.double())]
            change(reference)
            expected.append(step(reference))
            chosen = dispatcher_of(device, route, arrangement=arrangement)
            with kernels.using(chosen):
                step(made)  # The first measures.
                sparse(made).prepare_kernels()
                assert far(step(made), expected[0]) == {}
                change(made)
                assert far(step(made), expected[1]) == {}
            labels = [entry["label"] for entry in chosen.as_data().values()]
            taken = any(label.startswith(route) for label in labels)
            # CUTLASS takes no tile of 64 rows on every card; what it refuses, something else computed.
            assert taken or not any(label.startswith(route) for c in chosen._choices.values() for label in c.seconds)
            if taken and route.endswith("/1") and arrangement == "in place":
                metadata = sparse(made).cached_tensors()[0]
                assert metadata.data_ptr() == sparse(made).values.data_ptr() + sparse(made).values.nbytes


@on_devices
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=pytest.mark.slow), 7, 32])
def test_decoding(tokens: int, adapter: bool, device: str) -> None:
    made = layer(torch.float16, resident=False, adapter=adapter)
    x = torch.randn(tokens, IN).half()
    with torch.inference_mode():
        expected = copy.deepcopy(made).double()(x.double())
        chosen = dispatcher_of(device, "decode")
        with kernels.using(chosen):
            found = made.to(device_of(device))(x.to(device_of(device)))
    assert far({"y": found}, {"y": expected}) == {}
    assert [entry["label"] for entry in chosen.as_data().values()] == ["decode"]


@on_devices
@pytest.mark.parametrize("route", WHOLE)
@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
def test_compiled_whole_it_is_the_same(
    resident: bool, route: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_interpreter(monkeypatch, device)
    made = layer(torch.bfloat16, resident=resident).to(device_of(device))
    with kernels.using(dispatcher_of(device, route)):
        step(made)
        sparse(made).prepare_kernels()
        expected = step(made)
        sparse(made).values_changed()
        torch._dynamo.reset()
        compiled = torch.compile(made, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        assert far(step(made, compiled), expected) == {}


def never(calls: Mapping[str, object], *_: object) -> dict[str, float]:
    raise AssertionError(f"measured {sorted(calls)}")


def captured(run: Callable[[], tuple[Tensor, ...]], device: str, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """The outputs of a capture, and what fills them anew from whatever the operands hold then."""
    if device == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return outputs, graph.replay
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_capturing", lambda device: True)
        outputs = run()

    def replay() -> None:
        for output, new in zip(outputs, run(), strict=True):
            output.copy_(new)

    return outputs, replay


@on_devices
@pytest.mark.parametrize("route", WHOLE)
@pytest.mark.parametrize("resident", [False, True], ids=["derived", "resident"])
def test_the_products_of_a_step_are_captured_and_replayed(
    resident: bool, route: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With new inputs and new values: equal, to the bit, to the same products without a graph."""
    leave_out_interpreter(monkeypatch, device)
    made = layer(torch.bfloat16, resident=resident, adapter=False).to(device_of(device))
    weight, bias = sparse(made), made.bias
    assert bias is not None
    x, grad_y = torch.randn(TOKENS, IN).to(bias), torch.randn(TOKENS, OUT).to(bias)

    def products() -> tuple[Tensor, ...]:
        # The transpose is made in the graph, as values change between replays.
        weight.values_changed()
        leaf = x.detach().requires_grad_()
        y = weight(leaf, bias)
        return y.detach(), *torch.autograd.grad(y, (leaf, weight.values, bias), grad_y)

    chosen = dispatcher_of(device, route)
    with kernels.using(chosen):
        products()
        weight.prepare_kernels()
        products()
        chosen._timer = never
        outputs, replay = captured(products, device, monkeypatch)
        for _ in range(2):
            with torch.no_grad():
                for tensor in (x, grad_y, weight.values, bias):
                    tensor.copy_(torch.randn(tensor.shape).to(tensor))
            replay()
            found = [output.clone() for output in outputs]
            for output, expected in zip(found, products(), strict=True):
                assert same_bits(output, expected) and not output.isnan().any()


@on_devices
def test_nothing_is_measured_and_no_library_asked_while_a_graph_is_captured(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was never warmed up is expanded: learning an order of metadata would wait for the device."""
    values, indices = primitives.random_matrix(96, 224, torch.float16, device_of(device))
    x, grad_y = (torch.randn(40, width).half().to(device_of(device)) for width in (224, 96))
    chosen = Dispatcher(device_of(device), need(device, VENDORS[0]), timer=never)
    # Other objects of the same shapes, so that cuBLAS and Triton have what they need and the dispatcher has nothing.
    ahead = Dispatcher(device_of(device), timer=preferring("expand"))

    def products() -> tuple[Tensor, ...]:
        given = (values, indices)
        return (
            torch.ops.slope_dist.product(x, *given, "", None, None, None),
            torch.ops.slope_dist.input_gradient(grad_y, *given, None),
        )

    with kernels.using(ahead):
        expected = products()
    unsupported = type(chosen.vendors.routes[0]).unsupported
    monkeypatch.setattr(type(chosen.vendors.routes[0]), "unsupported", lambda *_: pytest.fail("asked in a capture"))
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with kernels.using(chosen), torch.cuda.graph(graph):
            outputs = products()
        graph.replay()
    else:
        monkeypatch.setattr(dispatch, "_capturing", lambda device: True)
        with kernels.using(chosen):
            outputs = products()
    monkeypatch.setattr(type(chosen.vendors.routes[0]), "unsupported", unsupported)
    assert all(same_bits(found, right) for found, right in zip(outputs, expected, strict=True))


@on_devices
@pytest.mark.parametrize("route", ["segment-k", *WHOLE])
def test_deterministic_steps_are_equal_to_the_bit(route: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the fastest way is one that is not: it is not taken."""
    leave_out_interpreter(monkeypatch, device)
    made = layer(torch.bfloat16, resident=False).to(device_of(device))
    chosen = dispatcher_of(device, route, deterministic=True)
    weight = sparse(made)
    chosen.warm_up(
        (kind, kernels.Problem(TOKENS, *shape, torch.bfloat16, device_of(device)))
        for kind, shape in (("product", (OUT, IN)), ("product", (IN, OUT)), ("input gradient", (OUT, IN)))
    )
    assert all(choice.candidate.deterministic for choice in chosen._choices.values())
    with kernels.using(chosen):
        weight.prepare_kernels()
        first = step(made)
        for _ in range(3):
            assert all(same_bits(value, first[name]) for name, value in step(made).items())


def held_bytes(make: Callable[[], list[Tensor]], device: str) -> int:
    """Bytes of a device's memory that something takes while it is held."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        held = make()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before if held else 0
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in make()}
    return sum(storages.values())


@on_devices
@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(
    ("arrangement", "resident", "bits"),
    [("in place", False, 10), ("kept", False, 10), ("derived", False, 9), ("in place", True, 20), ("kept", True, 20)],
    ids=str,
)
def test_resident_bits_an_element(
    arrangement: Arrangement, resident: bool, bits: int, vendor: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_interpreter(monkeypatch, device)
    # Every tensor is a multiple of the 512 bytes that torch's allocator rounds to.
    rows, columns, tokens = (1024, 1024, 64) if device == "cuda" else (128, 128, 8)
    chosen = dispatcher_of(device, f"{vendor}/1", arrangement=arrangement)
    problem = kernels.Problem(tokens, rows, columns, torch.bfloat16, device_of(device))
    assert chosen.product_choice(problem).vendor == vendor, chosen.report()

    def make() -> list[Tensor]:
        torch.manual_seed(3)
        matrix = CompressedMatrix.prune(torch.randn(rows, columns).bfloat16(), TWO_FOUR)
        weight = SparseWeight(matrix, resident_transpose=resident).to(device_of(device))
        weight.prepare_kernels()
        x = torch.randn(tokens, columns).bfloat16().to(device_of(device)).requires_grad_()
        weight(x).sum().backward()
        weight.values.grad = None
        return [weight.values.data, weight.indices, *weight.cached_tensors()]

    with kernels.using(chosen):
        # Orders of metadata, plans and the allocator's blocks are there after the first.
        make()
        assert 8 * held_bytes(make, device) / (rows * columns) == bits


@on_devices
def test_the_optimizers_one_pass_is_fused_adamw_and_a_new_transpose(device: str) -> None:
    """fp32, twenty steps: weights within what rounding of the same operations in another order comes to.

    A step's update is computed within a few units of 2^-24 of itself, and is at most a tenth of the weights here.
    """
    settings = OptimizerSettings((0.9, 0.95), 1e-8, 0.1, 0.0, 0.0)
    matrix = CompressedMatrix.prune(torch.randn(OUT, IN), TWO_FOUR)
    weight = SparseWeight(matrix, resident_transpose=True).to(device_of(device))
    start = weight.values.detach().clone()
    other = nn.Parameter(start.clone())
    optimizer = AdamW([{"params": [weight.values], "weight_decay": 0.1}], settings)
    optimizer.reset_state({"decay": [weight.values]})
    optimizer.write_transposes([weight])
    fused = torch.optim.AdamW([other], lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for number in range(20):
        for of in (optimizer, fused):
            of.param_groups[0]["lr"] = 0.05 * (number + 1) / 20
        weight.values.grad = torch.randn(OUT, IN // 2).to(other)
        other.grad = weight.values.grad.clone()
        optimizer.step()
        fused.step()
        weight.values_changed()
        assert weight.cached_tensors(), "the transpose was not written by the optimizer"
        made = pruning.doubly_pruned_transpose(weight.values.detach(), weight.indices, TWO_FOUR)
        assert all(same_bits(left, right) for left, right in zip(weight.transpose(), made, strict=True))
    assert float((weight.values - other).detach().norm() / other.detach().norm()) < 1e-6
    assert float((other.detach() - start).norm() / start.norm()) > 0.05
