"""A pipeline is the single process: losses, gradient norms, weights, masks, samples; with tensor and data ranks too.

Ten steps of a small OPT of three blocks, which two stages cannot share evenly, with accumulation, active clipping, a
warm-up and the adapter switch before step 6, by the real trainer; weights are read back through the real checkpoint.

Run: pytest tests/engine/test_pipeline_engine.py
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slope_dist.config import deepspeed_dict, derive, load_config
from slope_dist.data.sampling import IGNORED_LABEL
from slope_dist.engine.optimizer import OptimizerSettings, parameter_groups
from slope_dist.layers import Linear, NextTokenLoss, logical_tensors
from slope_dist.models import family
from slope_dist.parallel.environment import discover
from slope_dist.parallel.fragments import MemorySource
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.sparse import SparseWeight
from slope_dist.training.build import build, build_engine, layer_factory, model_shape, stages
from tests.distributed import end_ranks, run_ranks
from tests.runs import (
    FIRST_ADAPTER_STEP,
    SECTIONS,
    STEPS,
    VOCAB_SIZE,
    Poison,
    newest,
    read_all,
    same_bits,
    state_hash,
    step_rows,
    train,
    watch_engines,
    write_config,
)

EXACT = 1e-5
"""Relative bound in fp32: ten steps of rounding in another order of summation."""

NORM = 1e-4
"""Of gradient norms, which a ReLU or a column mask that rounding tips over would move by more."""

BF16 = 2.0**-8
"""Relative spacing of bf16: what one rounding of a weight to the other side changes."""

TABLE = "decoder.embed_tokens.weight"
GLOBAL_BATCH = SECTIONS["training"]["global_batch_size"]

# With this seed no unit of a ReLU is so near its kink that the rounding of one layout puts it on the other side.
SMALL: dict[str, Any] = {"model__num_layers": 3, "run__seed": 1}
PP2: dict[str, Any] = {"parallel__pipeline": 2}
TP2: dict[str, Any] = {"parallel__tensor": 2}
SEQUENCE: dict[str, Any] = {"parallel__sequence_parallel": True}
FP16: dict[str, Any] = {"precision": "fp16", "loss_scale__initial_power": 3, "loss_scale__window": 1000}


def allow_fp16() -> None:
    """Give DeepSpeed a CPU that says it can do fp16; torch's can."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Willing(CPU_Accelerator):
        def is_fp16_supported(self) -> bool:
            return True

    set_accelerator(Willing())


def observed_run(config: str) -> dict[str, Any]:
    """Train; returns what this rank read, held and cut."""
    from slope_dist.training.trainer import Trainer

    loaded = load_config(config)
    if loaded.precision == "fp16":
        allow_fp16()
    parts: list[list[int]] = []
    sparse: set[str] = set()
    tables: list[Tensor] = []
    process_groups: list[int] = []

    def watch(event: str, engine: Any, _: Any) -> None:
        if event == "built":
            parts.append(list(getattr(engine.module, "parts", [])))
            process_groups.append(len(dist.distributed_c10d._world.pg_map))
            linears = [module for module in engine.module.modules() if isinstance(module, Linear)]
            sparse.update(linear.name for linear in linears if isinstance(linear.weight, SparseWeight))
        if event == "before close":
            tables[:] = [t.tensor.detach().clone() for t in engine._state.tensors if t.name == TABLE]

    watch_engines(watch)
    trainer = Trainer(loaded, discover())
    batch = trainer.reader.batch
    samples: list[list[int]] = []

    def recorded(step: int, positions: Any) -> Any:
        made = batch(step, positions)
        samples.append([step, *made.samples.tolist()])
        return made

    trainer.reader.batch = recorded  # type: ignore[method-assign]
    trainer.run()
    return {
        "samples": samples,
        "parts": parts,
        "sparse": sorted(sparse),
        "table": tables[0] if tables else None,
        "process groups": process_groups,
        "expected parts": stages(loaded, trainer.derived),
    }


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    """Make a run once for all tests that ask for it; returns its folder and what its ranks saw."""
    made: dict[str, tuple[Path, list[Any]]] = {}

    def make(ranks: int, **changes: Any) -> tuple[Path, list[Any]]:
        key = f"{ranks} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            path = write_config(folder, corpus, **SMALL | changes)
            made[key] = (folder / "run", run_ranks(observed_run, ranks, str(path)))
        return made[key]

    return make


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def distance(a: Tensor, b: Tensor) -> float:
    difference = float((a.double() - b.double()).norm())
    return difference / float(b.double().norm()) if difference else 0.0


def far(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> dict[str, float]:
    """Tensors further than `bound` from what they should be, but for key biases, whose gradients are rounding."""
    assert found.keys() == expected.keys()
    distances = {name: distance(found[name], expected[name]) for name in expected if not name.endswith("k_proj.bias")}
    return {name: value for name, value in distances.items() if not value <= bound}


def assert_same_run(found: Path, expected: Path) -> None:
    """In fp32."""
    assert_same_rows(found, expected, EXACT, NORM)
    assert far(read_all(newest(found), "weight"), read_all(newest(expected), "weight"), EXACT) == {}
    assert_same_masks(found, expected)


def assert_same_run_rounded(found: Path, expected: Path) -> None:
    """In bf16 or fp16: each layout rounds the sums of gradients that it makes itself."""
    assert_same_rows(found, expected, 1e-4, BF16)
    weights, masters = (read_all(newest(found), kind) for kind in ("weight", "master"))
    assert all(torch.equal(weights[name], masters[name].to(weights[name].dtype)) for name in masters)
    others = read_all(newest(expected), "master")
    assert masters.keys() == others.keys()
    # All together: Adam magnifies the rounding of what has hardly any gradient.
    assert distance(*(torch.cat([group[name].view(-1) for name in others]) for group in (masters, others))) <= BF16 / 4
    assert distance(masters[TABLE], others[TABLE]) <= BF16
    assert_same_masks(found, expected)


def assert_same_rows(found: Path, expected: Path, bound: float, norm_bound: float) -> None:
    for mine, other in zip(step_rows(found), step_rows(expected), strict=True):
        assert (mine["step"], mine["lr"], mine["phase"]) == (other["step"], other["lr"], other["phase"])
        assert relative(mine["loss"], other["loss"]) <= bound, mine
        assert relative(mine["grad_norm"], other["grad_norm"]) <= norm_bound, mine
        assert mine["grad_norm"] > 1.2 * SECTIONS["training"]["gradient_clipping"], "clipping is meant to be active"


def assert_same_masks(found: Path, expected: Path) -> None:
    """And step counters."""
    mine, other = newest(found), newest(expected)
    masks = read_all(other, "metadata")
    assert read_all(mine, "metadata").keys() == masks.keys()
    assert all(torch.equal(tensor, masks[name]) for name, tensor in read_all(mine, "metadata").items())
    assert mine.scalars["optimizer_steps"] == other.scalars["optimizer_steps"]


def assert_same_samples(ranks: list[Any], layout: Layout) -> None:
    """Each replica's ranks read the same; the replicas together, the global batch."""
    replicas: dict[int, list[list[int]]] = {}
    for rank, seen in enumerate(ranks):
        assert replicas.setdefault(layout.position(rank).data, seen["samples"]) == seen["samples"]
    assert len(replicas) == layout.data
    for step in range(1, STEPS + 1):
        read = [sample for rows in replicas.values() for at, *samples in rows if at == step for sample in samples]
        assert sorted(read) == list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH))


def assert_tied(ranks: list[Any], layout: Layout) -> None:
    """The first stage's table and the last one's copy are the same bits; stages between have none."""
    first = ranks[: layout.tensor * layout.data]
    last = ranks[-len(first) :]
    for seen, copy in zip(first, last, strict=True):
        assert same_bits(seen["table"], copy["table"])
    assert all(seen["table"] is None for seen in ranks[len(first) : -len(first)])


CASES = [
    (Layout(pipeline=2), {"parallel__zero_stage": 0}),
    (Layout(pipeline=2), {"parallel__zero_stage": 1}),
    (Layout(pipeline=2), {"parallel__zero_stage": 1, "sparsity__pattern": "dense"}),
    (Layout(pipeline=2), {"parallel__zero_stage": 0, "training__recompute": "blocks"}),
    (Layout(pipeline=3), {"parallel__zero_stage": 1}),
    (Layout(pipeline=2, data=2), {"parallel__zero_stage": 0}),
    (Layout(pipeline=2, data=2), {"parallel__zero_stage": 1}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 0}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 1}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 0, "sparsity__pattern": "dense", **SEQUENCE}),
    (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 1, **SEQUENCE, "training__recompute": "blocks"}),
    (Layout(pipeline=2, tensor=2, data=2), {"parallel__zero_stage": 1, **SEQUENCE}),
    (Layout(pipeline=2), {"parallel__zero_stage": 1, "sparsity__column_mask_interval": 4}),
]


@pytest.mark.parametrize(("layout", "changes"), CASES, ids=str)
def test_pipeline_is_the_single_process(layout: Layout, changes: dict[str, Any], run: Callable) -> None:
    shared = {name: value for name, value in changes.items() if name.startswith("sparsity")}
    expected, [alone] = run(1, parallel__zero_stage=0, **shared)
    changes = {"parallel__pipeline": layout.pipeline, "parallel__tensor": layout.tensor, **changes}
    found, ranks = run(layout.world_size, **changes)
    assert_same_run(found, expected)
    assert_same_samples(ranks, layout)
    assert_tied(ranks, layout)
    # The dense first linears are the model's; a stage that begins with a later block has none.
    assert sorted({name for seen in ranks for name in seen["sparse"]}) == alone["sparse"]
    # The switch, which a dense run has none of, moves no layer.
    engines = 1 if changes.get("sparsity__pattern") == "dense" else 2
    for seen in ranks:
        assert seen["parts"] == [seen["expected parts"]] * engines
    if "sparsity__column_mask_interval" in changes:
        assert sum(name.endswith("column_mask") for name in read_all(newest(found), "metadata")) == 15


def test_later_stages_blocks_are_all_sparse(run: Callable) -> None:
    _, [first, last] = run(2, **PP2, parallel__zero_stage=1)
    assert first["parts"][0] == [0, 2, 5]
    assert len(first["sparse"]) == 6 - 3
    assert {f"decoder.layers.1.self_attn.{name}_proj" for name in "qkv"} < set(last["sparse"])
    assert len(last["sparse"]) == 2 * 6


def test_recomputing_blocks_changes_no_bit(run: Callable) -> None:
    kept, _ = run(2, **PP2, parallel__zero_stage=0)
    again, _ = run(2, **PP2, parallel__zero_stage=0, training__recompute="blocks")
    assert [row["loss"] for row in step_rows(again)] == [row["loss"] for row in step_rows(kept)]


def forwards_of_a_step(config: str) -> dict[str, int]:
    """Train a step; how often layers of each kind ran forwards on this rank."""
    engine, _, _ = engine_of(config)
    counts: dict[str, int] = {}
    for layer in engine.module.forward_funcs:
        name = type(layer).__name__
        layer.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    engine.train_step(batches_of(4))
    return counts


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("blocks", 2)])
def test_only_blocks_are_recomputed(recompute: str, times: int, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **SMALL, **PP2, training__recompute=recompute)
    first, last = run_ranks(forwards_of_a_step, 2, str(path))
    assert first == {"OPTEmbedding": 4, "OPTBlock": 4 * times}
    assert last == {"OPTBlock": 2 * 4 * times, "OPTHead": 4}


@pytest.mark.parametrize(
    ("layout", "changes"),
    [(Layout(pipeline=2, data=2), {}), (Layout(pipeline=2, tensor=2), SEQUENCE)],
    ids=str,
)
def test_pipeline_is_the_single_process_in_bf16(layout: Layout, changes: dict[str, Any], run: Callable) -> None:
    expected, _ = run(1, precision="bf16", parallel__zero_stage=1)
    sizes = {"parallel__pipeline": layout.pipeline, "parallel__tensor": layout.tensor}
    found, ranks = run(layout.world_size, precision="bf16", parallel__zero_stage=1, **sizes, **changes)
    assert_same_run_rounded(found, expected)
    assert_tied(ranks, layout)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("gradient_dtype", ["fp32", "model"])
def test_narrow_gradients_of_both_tables_are_summed(precision: str, gradient_dtype: str, run: Callable) -> None:
    """DeepSpeed keeps them in another place in each of these cases."""
    changes = {"precision": precision, "parallel__zero_stage": 1, "parallel__gradient_dtype": gradient_dtype}
    changes |= {"loss_scale__initial_power": 3, "loss_scale__window": 1000} if precision == "fp16" else {}
    expected, _ = run(1, **changes)
    found, ranks = run(2, **PP2, **changes)
    assert_tied(ranks, Layout(pipeline=2))
    assert_same_run_rounded(found, expected)


@pytest.mark.parametrize("stage", [0, 1])
def test_tied_tables_stay_equal_with_many_data_ranks(stage: int, run: Callable) -> None:
    """Sums of more than two terms depend on their order."""
    changes = {"training__global_batch_size": 16, "parallel__zero_stage": stage}
    expected, _ = run(1, **changes)
    found, ranks = run(8, **PP2, **changes)
    assert_tied(ranks, Layout(pipeline=2, data=4))
    assert_same_run(found, expected)


@pytest.mark.parametrize(
    "changes",
    [{"parallel__zero_stage": 0}, {"parallel__zero_stage": 1}, {"precision": "bf16", "parallel__zero_stage": 1}],
    ids=str,
)
@pytest.mark.parametrize("dense", [0, 1])
def test_stage_without_a_sparse_layer(dense: int, changes: dict[str, Any], run: Callable) -> None:
    layers = [f"decoder.layers.{block}.*" for block in ([0, 1] if dense == 0 else [1, 2])]
    changes = changes | {"sparsity__dense_layers": layers}
    expected, _ = run(1, **changes)
    found, ranks = run(2, **PP2, **changes)
    assert [bool(seen["sparse"]) for seen in ranks] == [dense != 0, dense == 0]
    (assert_same_run_rounded if "precision" in changes else assert_same_run)(found, expected)
    assert newest(found).scalars["optimizer_steps"]["adapters"] == STEPS - FIRST_ADAPTER_STEP + 1


def test_switch_gives_its_process_groups_back(run: Callable) -> None:
    _, ranks = run(8, **PP2, **TP2, **SEQUENCE, parallel__zero_stage=1)
    for seen in ranks:
        before, after = seen["process groups"]
        assert after == before


def cut_off(run_folder: Path, last: int) -> None:
    """Make a run one that was killed after the checkpoint of step `last`."""
    for folder in (run_folder / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > last:
            shutil.rmtree(folder)
    assert newest(run_folder).step == last


SAVING = {"checkpoint__interval": 4, "checkpoint__keep": 9}


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (Layout(pipeline=2), {"parallel__zero_stage": 0}),
        (Layout(pipeline=2, data=2), {"parallel__zero_stage": 1, "precision": "bf16"}),
        (Layout(pipeline=2, tensor=2), {"parallel__zero_stage": 1, **SEQUENCE}),
    ],
    ids=str,
)
def test_resumed_run_is_the_same_to_the_last_bit(
    layout: Layout, changes: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    sizes = {"parallel__pipeline": layout.pipeline, "parallel__tensor": layout.tensor}
    path = write_config(tmp_path, corpus, **SMALL | SAVING | sizes | changes)
    run_ranks(train, layout.world_size, str(path))
    files = {name: file.sha256 for name, file in newest(tmp_path / "run").manifest.files.items()}
    losses = [(row["loss"], row["grad_norm"]) for row in step_rows(tmp_path / "run")]
    # With the switch before it, and without.
    for last in (8, 4):
        cut_off(tmp_path / "run", last)
        run_ranks(train, layout.world_size, str(path))
        assert [(row["loss"], row["grad_norm"]) for row in step_rows(tmp_path / "run")] == losses
        assert {name: file.sha256 for name, file in newest(tmp_path / "run").manifest.files.items()} == files


def test_checkpoints_go_from_the_pipeline_to_one_process_and_back(run: Callable, corpus: Path, tmp_path: Path) -> None:
    expected, _ = run(1, parallel__zero_stage=0)
    config = SMALL | SAVING
    alone = write_config(tmp_path, corpus, **config, parallel__zero_stage=0).rename(tmp_path / "alone.json")
    piped = write_config(tmp_path, corpus, **config, **PP2, parallel__zero_stage=1)
    run_ranks(train, 2, str(piped))
    for last, ranks, path in ((4, 1, alone), (8, 2, piped), (4, 2, piped), (8, 1, alone)):
        cut_off(tmp_path / "run", last)
        run_ranks(train, ranks, str(path))
        assert_same_run(tmp_path / "run", expected)


def spoilt_run(config: str, how: str, spoilt_rank: int) -> dict[str, Any]:
    """Train with steps 4 and 8 spoilt on one rank; which steps left this rank's state as it was."""
    if load_config(config).precision == "fp16":
        allow_fp16()
    unchanged: list[int] = []
    before = ""
    hooks: list[Any] = []

    def watch(event: str, engine: Any, step: Any) -> None:
        nonlocal before
        if event == "before step":
            before = state_hash(engine)
            if step in (4, 8) and dist.get_rank() == spoilt_rank:
                hooks.append(spoil(engine, how))
        if event == "after step":
            while hooks:
                hooks.pop().remove()
            if state_hash(engine) == before:
                unchanged.append(step)

    watch_engines(watch)
    train(config)
    return {"unchanged": unchanged}


def spoil(engine: Any, how: str) -> Any:
    """Make the next micro-batches bad on this rank; returns what undoes it."""
    if how == "nan gradient":
        return engine.module.register_forward_hook(lambda module, arguments, y: Poison.apply(y, torch.nan))

    # The loss alone: its gradients stay finite.
    def infinite(module: nn.Module, arguments: Any, loss: Tensor) -> Tensor | None:
        return loss + torch.inf if isinstance(module, NextTokenLoss) else None

    return torch.nn.modules.module.register_module_forward_hook(infinite)


@pytest.mark.parametrize(
    ("how", "spoilt_rank", "changes"),
    [
        # Ranks 0 and 1 are the first stage's; 2 and 3 the last's.
        ("nan gradient", 1, {"parallel__zero_stage": 0}),
        ("nan gradient", 3, {"parallel__zero_stage": 1}),
        ("inf loss", 2, {"parallel__zero_stage": 0}),
        ("inf loss", 3, {"parallel__zero_stage": 1}),
        ("inf loss", 3, {"precision": "bf16"}),
        ("nan gradient", 0, {"precision": "bf16", "parallel__gradient_dtype": "model"}),
        ("nan gradient", 0, FP16 | {"loss_scale__initial_power": 0}),
    ],
    ids=str,
)
def test_bad_step_of_one_rank_changes_nothing_anywhere(
    how: str, spoilt_rank: int, changes: dict[str, Any], run: Callable, corpus: Path, tmp_path: Path
) -> None:
    path = str(write_config(tmp_path, corpus, **SMALL, **PP2, **changes))
    ranks = run_ranks(spoilt_run, 4, path, how, spoilt_rank)
    assert [rank["unchanged"] for rank in ranks] == [[4, 8]] * 4
    rows = step_rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {4: "non-finite", 8: "non-finite"}
    assert all(row["grad_norm"] is None for row in rows if "skipped" in row)
    assert all((row["loss"] is None) == (how == "inf loss" and row["step"] in (4, 8)) for row in rows)
    checkpoint = newest(tmp_path / "run")
    assert checkpoint.scalars["skipped_steps"] == 2
    assert checkpoint.scalars["optimizer_steps"]["decay"] == STEPS - 2


def test_overflow_above_the_smallest_scale_is_the_scalers_affair(corpus: Path, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, corpus, **SMALL, **PP2, **FP16))
    ranks = run_ranks(spoilt_run, 2, path, "nan gradient", 0)
    assert [rank["unchanged"] for rank in ranks] == [[4, 8]] * 2
    rows = step_rows(tmp_path / "run")
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {4: "loss scale", 8: "loss scale"}
    assert newest(tmp_path / "run").scalars["loss_scale"]["cur_scale"] == 2.0


def engine_of(config: str, adapters: bool = False) -> tuple[Any, Any, Any]:
    """The engine of a config on the ranks that are there, its groups and the config."""
    loaded = load_config(config)
    derived = derive(loaded, dist.get_world_size())
    groups = start_groups(Layout(loaded.parallel.tensor, derived.data_ranks, loaded.parallel.pipeline))
    engine = build_engine(loaded, derived, groups, adapters=adapters)
    engine.set_learning_rates({"base": 0.01, "adapters": 0.01})
    return engine, groups, loaded


def batches_of(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    windows = torch.randint(VOCAB_SIZE, (count, 2, 17), generator=draw)
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def evaluations(config: str) -> dict[str, Any]:
    """Losses of three batches; of the second, half of the labels are ignored on data rank 0 and all on data rank 1."""
    engine, groups, _ = engine_of(config)
    found = []
    for batch in evaluation_batches(groups.position.data):
        engine.train_step(batches_of(2))
        found.append(float(engine.evaluate(batch)))
    return {"losses": found}


def evaluation_batches(data_rank: int) -> list[tuple[Tensor, Tensor]]:
    batches = batches_of(3, seed=5 + data_rank)
    batches[1][1][: 1 + data_rank] = IGNORED_LABEL
    return batches


@pytest.mark.parametrize("changes", [{}, {**TP2, **SEQUENCE}], ids=str)
def test_evaluation_is_each_replicas_own(changes: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    layout = Layout(tensor=changes.get("parallel__tensor", 1), data=2, pipeline=2)
    path = write_config(tmp_path, corpus, **SMALL, **PP2, **changes, parallel__zero_stage=0)
    ranks = run_ranks(evaluations, layout.world_size, str(path))
    alone, [(_, first_labels), (_, labels), _] = evaluation_batches(0), evaluation_batches(1)
    assert not (first_labels == IGNORED_LABEL).any() and (labels == IGNORED_LABEL).all()
    # The first batch is evaluated after one step: held against the model in plain torch.
    config = load_config(str(path))
    model = build(config, layer_factory(config, derive(config, 4), adapters=False))
    step = torch.optim.AdamW(plain_groups(list(logical_tensors(model))), lr=0.01, betas=(0.9, 0.95), eps=1e-5)
    for tokens, wanted in batches_of(2):
        (model(tokens, wanted) / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
    step.step()
    for rank, seen in enumerate(ranks):
        data = layout.position(rank).data
        assert math.isnan(seen["losses"][1]) == (data == 1)
        expected = float(model(*evaluation_batches(data)[0]))
        assert relative(seen["losses"][0], expected) <= EXACT
        assert seen["losses"][2] == ranks[layout.tensor * data]["losses"][2]
    assert len(alone) == 3


def plain_groups(tensors: list[Any]) -> list[dict[str, Any]]:
    settings = OptimizerSettings((0.9, 0.95), 1e-5, 0.1, 0.1, 0.0)
    return [
        {key: value for key, value in group.items() if key != "name"} for group in parameter_groups(tensors, settings)
    ]


def build_and_say_nothing(config: str) -> None:
    """Build an engine, train a step, evaluate."""
    engine, _, _ = engine_of(config)
    engine.train_step(batches_of(4))
    engine.evaluate(batches_of(1)[0])
    engine.close()


def test_nothing_is_printed(corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **SMALL, **PP2)
    for outcome in end_ranks(build_and_say_nothing, 2, str(path)):
        assert (outcome.code, outcome.output, outcome.errors) == (0, "", "")


class UntiedHead(nn.Module):
    """A head with a table of its own."""

    def __init__(self, make: Any, shape: Any) -> None:
        super().__init__()
        self.norm = make.layer_norm("final_norm", shape.hidden_size)
        self.logits = make.linear("lm_head", shape.hidden_size, shape.vocab_size, split="whole", std=0.02, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits(self.norm(hidden))


def untied_run(config: str) -> dict[str, Any]:
    """Three steps of a model whose head has its own table; the same in plain torch on this rank."""
    from slope_dist.engine.pipeline_engine import PipelineEngine

    loaded = load_config(config)
    derived = derive(loaded, dist.get_world_size())
    groups = start_groups(Layout(1, derived.data_ranks, 2))
    shape = model_shape(loaded)

    def builders() -> list[Callable[[], nn.Module]]:
        make = layer_factory(loaded, derived, adapters=False)
        make.dense_layers["lm_head"] = "the head"
        return [*family("opt").layers(make, shape)[:-1], lambda: UntiedHead(make, shape)]

    numbers = OptimizerSettings((0.9, 0.95), 1e-5, 0.1, 0.1, 0.5)
    settings = deepspeed_dict(loaded, micro_batch_size=2, accumulation_steps=4, data_ranks=derived.data_ranks)
    engine = PipelineEngine(
        builders(), NextTokenLoss(), [0, 3, 5], groups, settings, numbers, column_mask_interval=1, recompute=False
    )
    engine.set_learning_rates({"base": 0.01})
    model = nn.Sequential(*(builder() for builder in builders()))
    optimizer = torch.optim.AdamW(plain_groups(list(logical_tensors(model))), lr=0.01, betas=(0.9, 0.95), eps=1e-5)
    rows = []
    for step in range(3):
        result = engine.train_step(batches_of(4, seed=step))
        losses = [NextTokenLoss()(model(tokens), labels) / 4 for tokens, labels in batches_of(4, seed=step)]
        sum(losses).backward()  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([result.loss, float(sum(losses)), result.grad_norm, float(norm)])
    source = MemorySource.take(*engine.export_state())
    expected = {tensor.name: tensor.tensor.detach() for tensor in logical_tensors(model)}
    held = {name for name, kind in source.pieces if kind == "weight"}
    found = {name: torch.cat([piece.tensor for piece in source.pieces[name, "weight"]]) for name in held}
    return {"rows": rows, "found": found, "expected": {name: expected[name].flatten() for name in held}}


@pytest.mark.parametrize("stage", [0, 1])
def test_head_with_its_own_table(stage: int, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **SMALL, **PP2, parallel__zero_stage=stage)
    first, last = run_ranks(untied_run, 2, str(path))
    assert first["rows"] == last["rows"]
    for loss, expected_loss, norm, expected_norm in first["rows"]:
        assert relative(loss, expected_loss) <= EXACT
        assert relative(norm, expected_norm) <= NORM
    assert TABLE in first["found"] and TABLE not in last["found"] and "lm_head.weight.values" in last["found"]
    for seen in (first, last):
        assert far(seen["found"], seen["expected"], EXACT) == {}
