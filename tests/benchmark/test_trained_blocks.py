"""block, step, refresh and decode measure what they say: state to the byte, real steps, wrong products refused.

Run: pytest tests/benchmark/test_trained_blocks.py
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn

from slope_dist.benchmark import block, cells, checking, decode, refresh, step, trainer
from slope_dist.benchmark.random_models import Form, build_block, sparse_weights, with_layers
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.config import Config, load_config
from slope_dist.engine import compilation
from slope_dist.errors import UserError
from slope_dist.models import Decoding
from slope_dist.sparse import SparseWeight, codec, kernels, pruning, reference
from tests.distributed import ROOT

CPU, BF16 = torch.device("cpu"), torch.bfloat16
TOKENS = 32


@pytest.fixture
def config() -> Config:
    return small("opt")


def small(family: str) -> Config:
    """The tiny config with blocks of width 64."""
    sizes = [f"model.family={family}", "model.hidden_size=64", "model.ffn_size=128", "model.num_heads=2"]
    sizes += ["model.num_layers=2", "model.sequence_length=16", "model.vocab_size=96", "adapters.rank=8"]
    return load_config(ROOT / "configs" / "tiny.json", sizes)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_block_s_rivals_and_their_state(family: str) -> None:
    row = block.measure("small", small(family), TOKENS, CPU, BF16, 0)
    assert list(row["rivals"]) == list(block.RIVALS) and (row["batch"], row["sequence_length"]) == (2, 16)
    state = {name: rival["state_bytes"] for name, rival in row["rivals"].items()}
    matrices = 4 * 64 * 64 + (2 if family == "opt" else 3) * 64 * 128
    # OPT: six biases and two norms of two vectors; LLaMA: two norms of one.
    vectors = (5 + 4) * 64 + 128 if family == "opt" else 2 * 64
    # Weight, gradient, master, two moments; 2:4: half of that, a bit an element; resident: 9 bits more.
    assert state[block.DENSE] == 16 * (matrices + vectors)
    assert state[block.DERIVED] == 16 * (matrices // 2 + vectors) + matrices // 8
    assert state[block.RESIDENT] == state[block.DERIVED] + matrices + matrices // 8
    factors = 8 * (4 * (64 + 64) + (2 if family == "opt" else 3) * (64 + 128))
    assert state[block.ADAPTERS] == state[block.RESIDENT] + 16 * factors
    assert row["rivals"][block.ADAPTERS]["adapter_rank"] == 8
    for rival in row["rivals"].values():
        assert rival["peak_bytes"] is None and rival["why_eager"] == "on the CPU" and rival["seconds"] > 0


def test_a_config_without_adapters_gets_the_paper_s_rank(config: Config) -> None:
    without = config.model_copy(update={"adapters": config.adapters.model_copy(update={"rank": 0})})
    assert [form.adapter_rank for form in block.forms(without)] == [0, 0, 0, 16]
    assert [form.adapter_rank for form in block.forms(load_config(ROOT / "configs/opt66b.json"))] == [0, 0, 0, 144]


def test_no_first_linear_is_dense_in_a_measured_block(config: Config) -> None:
    made = build_block(config, Form("derived", sparse=True), CPU, BF16)
    assert len(sparse_weights(made)) == 6


def test_tokens_that_make_no_whole_sequences_are_refused(config: Config) -> None:
    assert block.batch_of(config, 8) == (1, 8) and block.batch_of(config, 48) == (3, 16)
    with pytest.raises(UserError, match="--tokens 40 is no multiple of 16"):
        block.batch_of(config, 40)


def test_a_trainer_s_step_is_adamw_s(config: Config) -> None:
    """On fp32 masters, from the gradients of the 16-bit weights; transposes go with the values they were made of."""
    torch.manual_seed(0)
    x, grad_y = torch.randn(2, 16, 64).bfloat16(), torch.randn(2, 16, 64).bfloat16()
    form = Form("resident", sparse=True, resident=True)
    made = trainer.Trainer(lambda: build_block(config, form, CPU, BF16), lambda run: run(x).backward(grad_y), CPU)
    before = [parameter.detach().clone() for parameter in made.module.parameters()]
    masters = [master.detach().clone().requires_grad_() for master in made._masters]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    # A copy: an optimizer takes the tensors that it is given.
    optimizer.load_state_dict(deepcopy(made._optimizer.state_dict()))
    made.module(x).backward(grad_y)
    for master, parameter in zip(masters, made.module.parameters(), strict=True):
        master.grad = parameter.grad.float()
        parameter.grad = None
    optimizer.step()
    for weight in sparse_weights(made.module):
        weight.values_changed()
    made.step()
    for expected, parameter, old in zip(masters, made.module.parameters(), before, strict=True):
        assert torch.equal(parameter, expected.bfloat16()) and parameter.grad is None
        assert parameter.dim() == 1 or not torch.equal(parameter, old)
    for weight in sparse_weights(made.module):
        assert weight._transpose is not None
        expected = pruning.doubly_pruned_transpose(weight.values.detach(), weight.indices, weight.pattern)
        assert weight._transpose.values.equal(expected[0]) and weight._transpose.indices.equal(expected[1])


class OnACard(trainer.Trainer):
    """Compiles, as on a GPU."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.why_eager = None
        self._compile([self.module])


def summed(module: nn.Module) -> None:
    module(torch.ones(1, 16, 64, dtype=BF16)).sum().backward()


def test_a_module_that_the_compiler_refuses_runs_as_it_is(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(forward: Callable, **keywords: bool) -> Callable:
        def run(*arguments: Any) -> torch.Tensor:
            raise NotImplementedError("no such operator\nand more")

        return run

    monkeypatch.setattr(trainer.torch, "compile", refuses)
    made = OnACard(partial(build_block, config, Form("dense", sparse=False), CPU, BF16), summed, CPU)
    assert made.why_eager == "torch.compile: NotImplementedError: no such operator"
    made.step()


def test_a_compiled_block_is_one_graph_in_all_steps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a dispatcher's operators, its resident transposes made anew in each."""
    monkeypatch.setattr(kernels.primitives, "why_no_triton", lambda device_type: "not here")
    monkeypatch.setattr(compilation, "BACKEND", graphs := Counted())
    dispatcher = kernels.Dispatcher(CPU, timer=lambda calls, device, cold: dict.fromkeys(calls, 1.0))
    with kernels.using(dispatcher):
        form = Form("resident", sparse=True, resident=True)
        made = OnACard(partial(build_block, config, form, CPU, BF16), summed, CPU)
        made.step()
        made.step()
    assert made.why_eager is None and graphs.count == 1
    assert "slope_dist.product" in graphs.code and "slope_dist.transpose" not in graphs.code


def test_the_trainers_of_one_cell_share_graphs_which_do_not_count_against_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", graphs := Counted())
    monkeypatch.setattr(compilation, "MOST_GRAPHS", 1)
    # torch before 2.13 has one limit for all.
    monkeypatch.setattr(compilation, "signature", lambda function: signature(lambda: None))
    with torch._dynamo.config.patch(recompile_limit=1):
        for family in ("opt", "llama"):
            build = partial(build_block, small(family), Form("dense", sparse=False), CPU, BF16)
            trainer.forget_graphs()
            for _ in range(2):
                assert OnACard(build, summed, CPU).why_eager is None
    assert graphs.count == 2


class Counted:
    """A compiler that compiles nothing."""

    count = 0
    code = ""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.count += 1
        self.code += graph.print_readable(print_output=False)
        return graph.forward


def spoilt(monkeypatch: pytest.MonkeyPatch, product: str) -> None:
    right = getattr(reference, product)
    monkeypatch.setattr(reference, product, lambda *arguments: right(*arguments) * 1.02)
    for module in (block, step, refresh, decode):
        monkeypatch.setattr(module.timing, "in_turns", lambda *a, **k: pytest.fail("a wrong rival was timed"))


@pytest.mark.parametrize(
    ("product", "named"),
    [
        ("forward", "output"),
        ("input_gradient_resident", "input_gradient"),
        ("input_gradient", "input_gradient"),
        ("weight_gradient", "weight_gradient"),
    ],
)
def test_a_block_with_a_wrong_product_is_not_timed(
    product: str, named: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(monkeypatch, product)
    with pytest.raises(WrongResultError, match=f"block of small, .*: {named} is off the dense masked product"):
        block.measure("small", config, TOKENS, CPU, BF16, 0)


def test_wrong_transposes_are_not_timed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, "input_gradient_resident")
    with pytest.raises(WrongResultError, match="refresh of small, 64 x 64: input_gradient is off"):
        refresh.measure("small", config, TOKENS, CPU, BF16, 0)


def test_a_held_column_mask_is_what_the_check_goes_by(config: Config) -> None:
    form = Form("resident", sparse=True, resident=True)
    weight = sparse_weights(build_block(config, form, CPU, BF16, hold_column_mask=True))[0]
    checking.check_weight(weight, TOKENS, "held")
    # A mask of now, and one of before: both right for the weight that holds them.
    weight.values.data.copy_(torch.randn_like(weight.values))
    weight.values_changed()
    checking.check_weight(weight, TOKENS, "held")
    of_now = codec.pack_bits(checking.doubly_kept(weight.matrix().expand().float().abs(), mask(weight)))
    assert not torch.equal(weight.column_mask, of_now)


def mask(weight: SparseWeight) -> torch.Tensor:
    return codec.mask_of(weight.indices, weight.pattern)


def test_refreshes_beside_the_step(config: Config) -> None:
    row = refresh.measure("small", config, TOKENS, CPU, BF16, 0)
    assert row["shapes"] == {"64 x 64": 4, "64 x 128": 1, "128 x 64": 1}
    each = {f"{what} {shape}" for what in ("transpose", "column mask") for shape in row["shapes"]}
    assert set(row["rivals"]) == {refresh.STEP, refresh.TRANSPOSES, refresh.MASKS} | each
    assert row["rivals"][refresh.STEP]["ratio"] == 1
    # All four and the others cannot take less than one of them.
    assert row["rivals"][refresh.TRANSPOSES]["seconds"] > row["rivals"]["transpose 64 x 64"]["seconds"]


def test_a_whole_model_s_step(config: Config) -> None:
    row = step.measure("small", config, TOKENS, CPU, BF16, 0, layers=1)
    assert list(row["rivals"]) == [*block.RIVALS, step.DENSE_AGAIN]
    assert (row["layers"], row["layers_of_model"]) == (1, 2)
    rivals = row["rivals"]
    ends = (rivals["dense"]["ratio"] + rivals[step.DENSE_AGAIN]["ratio"]) / 2
    assert ends == pytest.approx(1) and rivals["derived"]["tokens_per_second"] > 0
    spoiled = pytest.MonkeyPatch()
    spoilt(spoiled, "weight_gradient")
    spoiled.setattr(step.timing, "in_turns", lambda rivals, *a: {n: _Timing() for n in rivals})
    with pytest.raises(WrongResultError, match="step of small, resident"):
        # Block 0's feed-forward is sparse, its first linears are not.
        step.measure("small", config, TOKENS, CPU, BF16, 0, layers=2)
    spoiled.undo()


class _Timing:
    def summary(self) -> dict[str, float]:
        return {"seconds": 1.0, "host_seconds": 1.0}


def test_layers_are_counted_then_tried(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = with_layers(config, 50)
    block_bytes = 16 * (4 * 64 * 64 + 2 * 64 * 128 + (5 + 4) * 64 + 128)
    rest = 16 * ((96 + 18) * 64 + 2 * 64)
    for layers in (1, 7, 50):
        memory = (rest + layers * block_bytes) / step.STATE_SHARE
        assert step.most_layers(deep, int(memory) + 1) == layers
        assert layers == 1 or step.most_layers(deep, int(memory) - 2) == layers - 1
    assert step.most_layers(deep, 10**12) == 50

    tried = []

    class Taken:
        def step(self) -> None:
            pass

    def refuse_above(most: int) -> None:
        def made(config: Config, *arguments: object) -> Taken:
            tried.append(config.model.num_layers)
            if config.model.num_layers > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return Taken()

        tried.clear()
        monkeypatch.setattr(step, "trainer", made)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory_of(9), memory_of(9)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def memory_of(layers: int) -> int:
        return int((rest + layers * block_bytes) / step.STATE_SHARE) + 1

    refuse_above(7)
    assert step.layers_that_fit(deep, TOKENS, torch.device("cuda"), BF16) == 7 and tried == [9, 8, 7]
    refuse_above(0)
    with pytest.raises(cells.NotMeasuredError, match="not even one block"):
        step.layers_that_fit(deep, TOKENS, torch.device("cuda"), BF16)


@pytest.mark.parametrize("share", decode.RANKS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_inference_of_both_models(family: str, share: float) -> None:
    work = decode.Work(prompt=8, prefill=32, batches=(1, 3))
    row = decode.measure("small", small(family), share, work, CPU, BF16, 0)
    assert row["adapter_rank"] == (0 if share == 0 else 16) and row["layers"] == 2
    assert list(row["uses"]) == ["prefill", "decode 1", "decode 3"] and row["prompts"] == 4
    for use, tokens in (("prefill", 32), ("decode 1", 1), ("decode 3", 3)):
        for rival in row["uses"][use].values():
            assert rival["tokens_per_second"] == pytest.approx(tokens / rival["seconds"])
    dense, sparse = row["resident_bytes"][decode.DENSE], row["resident_bytes"][decode.SPARSE]
    # Of two blocks, all but the first three linears: 9 bits for 16, and two factors of 16 bits.
    ffn = [(128, 64), (64, 128)] if family == "opt" else [(128, 64), (128, 64), (64, 128)]
    pruned = [(64, 64)] * 5 + ffn * 2
    saved = sum(rows * columns * 7 // 8 for rows, columns in pruned)
    assert dense - sparse == saved - 2 * row["adapter_rank"] * sum(rows + columns for rows, columns in pruned)


@pytest.mark.parametrize("share", decode.RANKS[:2])
def test_a_wrong_layer_is_not_timed(share: float, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, "forward")
    with pytest.raises(WrongResultError, match=r"small, rank \d+, .*: output is off the dense masked product"):
        decode.measure("small", config, share, decode.Work(prompt=8, prefill=8), CPU, BF16, 0)


def test_layers_are_checked_with_every_number_of_tokens(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.forward

    def wrong_for_three(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return right(x, *arguments) * (1.02 if len(x) == 3 else 1.0)

    monkeypatch.setattr(reference, "forward", wrong_for_three)
    with pytest.raises(WrongResultError, match="64 x 64, 3 tokens: output is off"):
        decode.measure("small", config, 0.0, decode.Work(prompt=8, prefill=8, batches=(1, 3)), CPU, BF16, 0)


def test_a_token_is_written_behind_the_prompt_each_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timed step is the one that generation takes, so its logits are those of the whole sequence."""
    torch.manual_seed(0)
    model = decode.build_language_model(config, Form("2:4", sparse=True), CPU, torch.float32).eval()
    made: list[Decoding] = []
    monkeypatch.setattr(decode, "Decoding", lambda *given: made.append(Decoding(*given)) or made[-1])
    with torch.inference_mode():
        write = decode._writing(model, 2, 8, CPU)
        [decoding] = made
        # Zeros would take less power than what they stand for.
        assert all((tensor != 0).all() for tensor in decoding.tensors)
        decoding.seen = 0
        model.logits(torch.zeros(2, 8, dtype=torch.int64), decoding)
        whole = model.logits(torch.zeros(2, 9, dtype=torch.int64))[:, -1:]
        for _ in range(2):
            torch.testing.assert_close(write(), whole, rtol=1e-4, atol=1e-4)


def test_keys_and_values_take_room_from_layers(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both models: what does not fit ends the cell without a number."""
    deep = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 400})})
    cuda, work = torch.device("cuda"), decode.Work(prompt=64, batches=(1, 16))
    kept = 2 * 2 * 16 * 65 * config.model.hidden_size * BF16.itemsize
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(kept * 200 / decode.MEMORY_SHARE), 0))
    assert 1 < decode.layers_that_fit(deep, work, cuda, BF16) < 200
    few = decode.Work(prompt=1, batches=(1,))
    assert decode.layers_that_fit(deep, few, cuda, BF16) > decode.layers_that_fit(deep, work, cuda, BF16)


def test_the_operations_of_a_block_are_what_each_adds_to_the_model(config: Config) -> None:
    one, three = (block.flops_of_model(with_layers(config, layers), 32) for layers in (1, 3))
    assert 0 < 2 * block.flops_of_block(config, 32) == three - one
    assert block.utilization(1000, 10.0, CPU, BF16) is None
