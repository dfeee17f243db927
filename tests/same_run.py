"""Whether two small runs are the same run: bounds, runs made once for many tests, what they read, and the assertions.

Assertions have messages: of its own accord pytest explains those of test modules only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from slope_dist.config import derive, load_config
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.training.build import build_engine
from tests.distributed import run_ranks
from tests.runs import SECTIONS, STEPS, distance, newest, read_all, relative, same_bits, step_rows, write_config

EXACT = 1e-5
"""Relative bound in fp32: ten steps of rounding in another order of summation."""

NORM = 1e-4
"""Of gradient norms, which a ReLU or a column mask that rounding tips over would move by more."""

BF16 = 2.0**-8
"""Relative spacing of bf16: what one rounding of a weight to the other side changes."""

GLOBAL_BATCH, CLIPPING = (SECTIONS["training"][key] for key in ("global_batch_size", "gradient_clipping"))

Rows = list[dict[str, Any]]


def maker_of_runs(
    function: Callable[[str], Any], corpus: Path, tmp_path_factory: pytest.TempPathFactory, **defaults: Any
) -> Callable[..., tuple[Path, list[Any]]]:
    """What makes a run once for all that ask for it: `make`(ranks, **changes to the config on top of `defaults`).

    It returns the run's folder and what `function`(path of the config) returned on each rank.
    """
    made: dict[str, tuple[Path, list[Any]]] = {}

    def make(ranks: int, **changes: Any) -> tuple[Path, list[Any]]:
        key = f"{ranks} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            path = write_config(folder, corpus, **defaults | changes)
            made[key] = (folder / "run", run_ranks(function, ranks, str(path)))
        return made[key]

    return make


def engine_of(config: str, adapters: bool = False) -> tuple[Any, Any, Any]:
    """The engine of a config on the ranks that are there, its groups and the config."""
    loaded = load_config(config)
    derived = derive(loaded, dist.get_world_size())
    groups = start_groups(Layout(loaded.parallel.tensor, derived.data_ranks, loaded.parallel.pipeline))
    engine = build_engine(loaded, derived, groups, adapters=adapters)
    engine.set_learning_rates({"base": 0.01, "adapters": 0.01})
    return engine, groups, loaded


def far(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> dict[str, float]:
    """Tensors further than `bound` from what they should be, but for key biases, whose gradients are rounding."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    distances = {name: distance(found[name], expected[name]) for name in expected if not name.endswith("k_proj.bias")}
    return {name: value for name, value in distances.items() if not value <= bound}


def masters_apart(found: Path, expected: Path) -> float:
    """How far the masters are, all together: Adam magnifies the rounding of what has hardly any gradient."""
    masters, others = (read_all(newest(run), "master") for run in (found, expected))
    assert masters.keys() == others.keys(), masters.keys() ^ others.keys()
    return distance(*(torch.cat([group[name].view(-1) for name in others]) for group in (masters, others)))


def assert_same_run(
    found: Path,
    expected: Path,
    *,
    bound: float = EXACT,
    norm: float | None = None,
    clipped: float = 1.5,
    weights: str = "weight",
) -> None:
    """Rows, final weights (of kind `weights`), masks; gradient norms by a bound of their own where one is given."""
    assert_same_rows(step_rows(found), step_rows(expected), loss=bound, norm=norm or bound, clipped=clipped)
    off = far(read_all(newest(found), weights), read_all(newest(expected), weights), bound)
    assert off == {}, off
    assert_same_masks(found, expected)


def assert_same_run_in_bf16(found: Path, expected: Path) -> None:
    """Another rounding of the same run: rows, masters all together, masks.

    How far single tensors may be depends on the processor: without AVX-512 adapters of such a run are 4 % apart.
    """
    assert_same_rows(step_rows(found), step_rows(expected), loss=BF16, norm=2 * BF16)
    apart = masters_apart(found, expected)
    assert apart <= BF16, apart
    assert_same_masks(found, expected)


def assert_same_rows(found: Rows, expected: Rows, *, loss: float, norm: float, clipped: float = 0.0) -> None:
    """Rows of metrics, by bounds on losses and gradient norms; the latter exceed `clipped` times the clipping."""
    for mine, other in zip(found, expected, strict=True):
        assert all(mine[key] == other[key] for key in ("step", "lr", "phase")), (mine, other)
        assert relative(mine["loss"], other["loss"]) <= loss, (mine, other)
        assert relative(mine["grad_norm"], other["grad_norm"]) <= norm, (mine, other)
        assert mine["grad_norm"] > clipped * CLIPPING, f"clipping is meant to be active: {mine}"


def assert_same_masks(found: Path, expected: Path) -> None:
    """And step counters."""
    mine, other = newest(found), newest(expected)
    masks, others = read_all(mine, "metadata"), read_all(other, "metadata")
    assert masks.keys() == others.keys(), masks.keys() ^ others.keys()
    wrong = [name for name in others if not same_bits(masks[name], others[name])]
    assert wrong == [], wrong
    steps = mine.scalars["optimizer_steps"], other.scalars["optimizer_steps"]
    assert steps[0] == steps[1], steps


def assert_rounded_masters(run: Path) -> None:
    """The model's own copy is the fp32 master in the precision of the run, and nothing else."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[load_config(run / "config.json").precision]
    weights, masters = (read_all(newest(run), kind) for kind in ("weight", "master"))
    dtypes = {tensor.dtype for tensor in weights.values()}, {tensor.dtype for tensor in masters.values()}
    assert dtypes == ({dtype}, {torch.float32}), dtypes
    wrong = [name for name in masters if not torch.equal(weights[name], masters[name].to(dtype))]
    assert wrong == [], wrong


def assert_same_samples(ranks: list[Any], layout: Layout) -> None:
    """Each replica's ranks read the same `samples`; the replicas together, the global batch of every step."""
    replicas: dict[int, list[list[int]]] = {}
    for rank, seen in enumerate(ranks):
        assert replicas.setdefault(layout.position(rank).data, seen["samples"]) == seen["samples"], f"rank {rank}"
    assert len(replicas) == layout.data, replicas.keys()
    read: dict[int, list[int]] = {}
    for step, *samples in (row for rows in replicas.values() for row in rows):
        read[step] = sorted([*read.get(step, []), *samples])
    assert read == {
        step: list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)) for step in range(1, STEPS + 1)
    }, read
