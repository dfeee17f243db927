"""A run that computes its products by a dispatcher is the reference's run, in every engine and layout.

Losses, gradient norms, weights, masks and step counters over ten steps and the adapter switch, by the real trainer. On
these CPUs the dispatcher is made for the CPU, with a vendor of plain torch that is preferred to all else: what is shown
is that engines hand weights, metadata, transposes, biases and adapters to it rightly, and that ranks agree on choices.

Run: pytest tests/engine/test_with_kernels.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.config import Config, Derived, load_config
from slope_dist.parallel import collectives
from slope_dist.parallel.environment import discover
from slope_dist.sparse import kernels
from slope_dist.training import products, trainer
from tests.same_run import assert_same_run, assert_same_run_in_bf16, maker_of_runs
from tests.sparse.kernels.vendors import PlainVendor, preferring, vendors

CPU = torch.device("cpu")


def run_with_kernels(config: str) -> dict[str, Any]:
    """Train with a dispatcher; returns which candidates computed something, and how metadata came to the vendor."""
    # The steps between products are plain torch here: those of Triton have tests of their own.
    os.environ.pop("TRITON_INTERPRET", None)
    vendor = PlainVendor()
    made: list[kernels.Dispatcher] = []

    def start(config: Config, derived: Derived, folder: Path) -> list[str]:
        store = kernels.ChoiceStore(folder / products.FILE) if collectives.rank() == 0 else None
        arrangement = "derived" if config.parallel.shards_parameters else "kept"
        timer = preferring("plain/1", "plain/2")
        dispatcher = kernels.Dispatcher(CPU, vendors(vendor), store, arrangement=arrangement, timer=timer)
        products.share_choices(dispatcher, products.product_uses(config, derived, CPU))
        vendor.seen.clear()
        kernels.activate(dispatcher)
        made.append(dispatcher)
        return dispatcher.report()

    trainer.start_products = start
    trainer.Trainer(load_config(config), discover()).run()
    (dispatcher,) = made
    return {"seen": sorted(set(vendor.seen)), "choices": sorted(dispatcher.as_data())}


def reference_run(config: str) -> None:
    trainer.Trainer(load_config(config), discover()).run()


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    return maker_of_runs(reference_run, corpus, tmp_path_factory)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Any]]]:
    return maker_of_runs(run_with_kernels, corpus, tmp_path_factory)


@pytest.mark.parametrize(
    ("ranks", "weights", "layout"),
    [
        (1, "kept", {"zero_stage": 0}),
        pytest.param(2, "kept", {"zero_stage": 1}, marks=pytest.mark.slow),
        pytest.param(2, "kept", {"zero_stage": 2}, marks=pytest.mark.slow),
        (2, "none", {"zero_stage": 3}),
        (2, "none", {"engine": "fsdp"}),
        pytest.param(2, "kept", {"zero_stage": 1, "tensor": 2}, marks=pytest.mark.slow),
        (2, "kept", {"zero_stage": 1, "tensor": 2, "sequence_parallel": True}),
        (2, "kept", {"zero_stage": 1, "pipeline": 2}),
    ],
    ids=["alone", "ZeRO 1", "ZeRO 2", "ZeRO 3", "FSDP2", "tensor", "sequence", "pipeline"],
)
def test_every_layout(ranks: int, weights: str, layout: dict[str, Any], expected: Callable, run: Callable) -> None:
    alone, _ = expected(1, parallel__zero_stage=0)
    found, told = run(ranks, **{f"parallel__{key}": value for key, value in layout.items()})
    assert_same_run(found, alone)
    for rank in told:
        # Whole weights keep their metadata, and sharded ones have it made each time. Transposes are nobody else's: also
        # one that is made for a single product lies where it is read. While a weight's form is chosen it has none.
        assert {weights, "in place"} <= set(rank["seen"]) <= {weights, "in place", "none"}
        assert rank["choices"] == told[0]["choices"] and any("product" in key for key in rank["choices"])
    stored = json.loads((found / products.FILE).read_text())
    assert [sorted(choices) for choices in stored["settings"].values()] == [told[0]["choices"]]


@pytest.mark.parametrize("changes", [{"sparsity__column_mask_interval": 4}, {"training__recompute": "blocks"}], ids=str)
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_held_masks_and_recomputed_blocks(stage: int, changes: dict, expected: Callable, run: Callable) -> None:
    alone, _ = expected(1, parallel__zero_stage=0, **changes)
    found, _ = run(2, parallel__zero_stage=stage, **changes)
    assert_same_run(found, alone)


@pytest.mark.slow
def test_bf16(expected: Callable, run: Callable) -> None:
    alone, _ = expected(1, precision="bf16", parallel__zero_stage=1)
    found, _ = run(2, precision="bf16", parallel__zero_stage=1)
    assert_same_run_in_bf16(found, alone)
