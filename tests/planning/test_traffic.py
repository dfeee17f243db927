"""What the planner says a rank sends is what collectives carry: counted on two ranks, and in the traffic benchmark.

Run: pytest tests/planning/test_traffic.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from slope_dist.benchmark.traffic import GATHERED, REDUCED, Case, Size, TrafficCounter
from slope_dist.config import Config, derive
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.planning import measure
from slope_dist.planning.traffic import Message, group_of, messages
from slope_dist.training.build import build_engine, build_share, stages
from tests.distributed import ROOT, run_ranks

SLACK = 1.03
"""Of what is counted: the loss, and vectors that tensor ranks sum."""


def config_of(parallel: dict[str, Any], *, layers: int = 3, recompute: str = "none", micro_batches: int = 2) -> Config:
    return Config.model_validate(
        {
            "model": {
                "hidden_size": 128,
                "ffn_size": 256,
                "num_heads": 4,
                "num_layers": layers,
                "vocab_size": 64,
                "sequence_length": 32,
            },
            "adapters": {"rank": 0},
            "data": {"folder": "unused"},
            "training": {
                "steps": 4,
                "global_batch_size": 2 * micro_batches,
                "micro_batch_size": 2,
                "learning_rate": 1e-4,
                "recompute": recompute,
            },
            "precision": "fp32",
            "parallel": {"zero_stage": 0} | parallel,
        }
    )


def predicted(config: Config, ranks: int, stage: int = 0) -> list[Message]:
    derived = derive(config, ranks)
    layers = build_share(config, derived, adapters=False, stage=stage)
    first, last = stage == 0, stage == len(stages(config, derived)) - 2
    return messages(config, derived, stage, len(layers) - first - last, measure(nn.ModuleList(layers)))


def total(found: list[Message], group: str) -> dict[str, int]:
    """Bytes of whole tensors, as the counter has them."""
    sums = {REDUCED: 0, GATHERED: 0}
    for message in found:
        if message.group == group:
            sums[GATHERED if message.operation == "all-gather" else REDUCED] += message.bytes * message.times
    return sums


def counted_step(text: str) -> dict[str, int]:
    """One training step of two ranks: bytes by kind, and by operation."""
    config = Config.model_validate(json.loads(text))
    layout = Layout(tensor=config.parallel.tensor, data=2 // config.parallel.tensor)
    groups = start_groups(layout)
    engine = build_engine(config, derive(config, 2), groups, adapters=False)
    tokens = torch.randint(64, (2, 2, 33), generator=torch.Generator().manual_seed(0))
    engine.begin_step(1)
    engine.set_learning_rates({"base": 1e-4})
    with TrafficCounter(groups.data if layout.tensor == 1 else groups.tensor) as counter:
        engine.train_step([(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens])
    engine.close()
    return {kind: counter.total[kind] for kind in (REDUCED, GATHERED)} | counter.operations


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks(recompute: str, sequence: bool) -> None:
    config = config_of({"tensor": 2, "sequence_parallel": sequence}, recompute=recompute)
    for counted in run_ranks(counted_step, 2, config.model_dump_json()):
        for kind, expected in total(predicted(config, 2), "tensor").items():
            assert expected <= counted[kind] <= SLACK * expected, (kind, counted, expected)


@pytest.mark.parametrize(
    "parallel", [*({"zero_stage": stage} for stage in range(4)), {"engine": "fsdp"}], ids=lambda p: str(*p.values())
)
def test_gradients_travel_by_the_operation_that_is_planned(parallel: dict[str, Any]) -> None:
    """An all-reduce sends twice what a reduce-scatter does."""
    config = config_of(parallel)
    [gradients] = [m for m in predicted(config, 2) if m.what == "gradients"]
    names = {"all-reduce": {"allreduce_"}, "reduce-scatter": {"_reduce_scatter_base_", "reduce_scatter_"}}
    for counted in run_ranks(counted_step, 2, config.model_dump_json()):
        by = sum(counted.get(name, 0) for name in names[gradients.operation])
        assert by >= 0.98 * gradients.bytes * gradients.times, (gradients, counted)


def test_data_ranks_as_the_benchmark_has_counted_them() -> None:
    content = json.loads((ROOT / "docs/results/traffic-cpu.json").read_text())
    assert len(content["rows"]) == 9
    for row in content["rows"]:
        case, size = Case(row["engine"], row["gradient_dtype"]), Size(**row["size"])
        for pattern in ("dense", "2:4"):
            shallow, deep = (total(predicted(case.config(size, pattern, n), 2), "data") for n in (2, 3))
            block = {kind: deep[kind] - shallow[kind] for kind in deep}
            assert block == row[pattern]["block_bytes"], (case, pattern)


def test_gradients_travel_after_every_micro_batch_where_ranks_keep_a_part_of_them() -> None:
    for stage, times in ((0, 1), (1, 1), (2, 2), (3, 2)):
        config = config_of({"zero_stage": stage}, micro_batches=4)
        [gradients] = [m for m in predicted(config, 2) if m.what == "gradients"]
        assert gradients.times == times, stage


def test_stages_send_to_both_sides() -> None:
    config = config_of({"pipeline": 3, "zero_stage": 1}, layers=6)
    ways = []
    for stage in range(3):
        [message] = [m for m in predicted(config, 3, stage) if m.group == "pipeline"]
        assert message.bytes == 2 * 32 * 128 * 4
        ways.append(message.times)
    assert ways == [2, 4, 2], "two micro-batches"


def test_the_ring() -> None:
    message = Message(group="data", what="x", operation="all-reduce", bytes=1000, times=3, ranks=4)
    assert message.sent == 2 * 3 * 1000 * 3 // 4
    assert Message(group="data", what="x", operation="all-gather", bytes=1000, times=3, ranks=4).sent == 2250


def test_neighbours_are_tensor_ranks() -> None:
    config = config_of({"tensor": 2, "pipeline": 2, "zero_stage": 1})
    derived = derive(config.model_copy(), 8)
    assert group_of(config, derived, "tensor") == [0, 1]
    assert group_of(config, derived, "data") == [0, 2]
    assert group_of(config, derived, "pipeline") == [0, 4]
