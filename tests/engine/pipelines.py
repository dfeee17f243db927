"""Small runs of pipelines, what is seen of them, and what they are held against."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slope_dist.config import derive, load_config
from slope_dist.engine.optimizer import OptimizerSettings, parameter_groups
from slope_dist.layers import Linear
from slope_dist.parallel.environment import discover
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.sparse import SparseWeight
from slope_dist.training.build import build_engine, stages
from tests.distributed import run_ranks
from tests.runs import (
    SECTIONS,
    STEPS,
    VOCAB_SIZE,
    newest,
    read_all,
    same_bits,
    step_rows,
    watch_engines,
    write_config,
)
from tests.training.test_finite_check import allow_fp16

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
    released: list[weakref.ref] = []
    alive: list[bool] = []

    def watch(event: str, engine: Any, _: Any) -> None:
        if event == "built":
            alive.extend(reference() is not None for reference in released)
            released[:] = [weakref.ref(held) for held in (engine._engine, engine._adam, engine.module)]
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
        "alive after the switch": alive,
        "expected parts": stages(loaded, trainer.derived),
    }


def maker_of_runs(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """What makes a run once for all that ask for it; it returns the run's folder and what the ranks saw."""
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
    return [(window[:, :-1].clone(), window[:, 1:].clone()) for window in windows]


def plain_groups(tensors: list[Any]) -> list[dict[str, Any]]:
    settings = OptimizerSettings((0.9, 0.95), 1e-5, 0.1, 0.1, 0.0)
    return [
        {key: value for key, value in group.items() if key != "name"} for group in parameter_groups(tensors, settings)
    ]
