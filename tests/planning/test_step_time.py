"""The time of a step follows from its parts: products, links, stages; what is measured is used; what is wrong is told.

No card has been measured yet: numbers of cards here are made up, and say nothing but that the arithmetic is right.

Run: pytest tests/planning/test_step_time.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slope_dist.config import Config, derive, load_config
from slope_dist.errors import UserError
from slope_dist.planning import measure
from slope_dist.planning.cluster import Cluster
from slope_dist.planning.gpus import GPU_MEMORY, Peaks, kind_of
from slope_dist.planning.products import Measured, Product, Roofline, read_measured
from slope_dist.planning.step_time import StepTime, step_time
from slope_dist.training.build import build_share, stages
from tests.distributed import ROOT

PEAKS = Peaks(dense=1e14, sparse=2e14, bandwidth=1e12)


class Even:
    """Every product runs at the same operations a second."""

    basis = "made up"

    def seconds(self, wanted: Product) -> float:
        return wanted.flops / 1e14


def config_of(name: str = "opt13b", *changes: str) -> Config:
    return load_config(ROOT / f"configs/{name}.json", changes)


def predict(config: Config, cluster: Cluster, times: Any = None, adapters: bool = False) -> StepTime:
    derived = derive(config, cluster.gpus)
    count = len(stages(config, derived)) - 1
    layers = [build_share(config, derived, adapters=adapters, stage=stage) for stage in range(count)]
    shares = [measure(share) for share in layers]
    return step_time(config, derived, [list(share) for share in layers], shares, cluster, times or Even())


def cluster_of(nodes: int = 4, **changes: Any) -> Cluster:
    return Cluster.of("a100-80gb", 8, nodes, **changes)


def test_products_are_all_of_them() -> None:
    config = config_of("opt13b", "training.recompute=none", "parallel.tensor=1", "parallel.pipeline=1")
    found = predict(config, cluster_of(1))
    model = config.model
    block = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.ffn_size
    matrices = model.num_layers * block + model.vocab_size * model.hidden_size
    tokens = config.training.global_batch_size * model.sequence_length / 8
    assert found.products == pytest.approx(6 * matrices * tokens / 1e14, rel=1e-9)
    again = predict(
        config.model_copy(update={"training": config.training.model_copy(update={"recompute": "blocks"})}),
        cluster_of(1),
    )
    assert again.products == pytest.approx((6 * matrices + 2 * model.num_layers * block) * tokens / 1e14, rel=1e-9)
    assert found.pipeline == found.bubble == found.tensor == 0


def test_parts_add_up_and_adapters_cost() -> None:
    config, cluster = config_of(), cluster_of()
    before, after = (predict(config, cluster, adapters=adapters) for adapters in (False, True))
    assert before.total == pytest.approx(sum(vars(before).values()))
    assert 1.0 < after.products / before.products < 1.1
    assert after.total > before.total


def test_a_pipeline_waits_for_the_others_once() -> None:
    one = ("parallel.tensor=4", "model.num_layers=40")
    found = {}
    for size in (256, 1024):
        config = config_of("opt13b", *one, "parallel.pipeline=4", f"training.global_batch_size={size}")
        found[size] = predict(config, cluster_of(2))
    # Filling and draining do not depend on the number of micro-batches.
    assert found[256].bubble == pytest.approx(found[1024].bubble)
    assert found[1024].products == pytest.approx(4 * found[256].products)
    # Of four stages three wait, of which the last has the head, too.
    each = (found[1024].total - found[1024].bubble) / derive(config, 16).accumulation_steps
    assert 2.5 * each < found[1024].bubble < 3.2 * each


def test_slow_links_between_nodes_cost_data_ranks_alone() -> None:
    config = config_of("opt13b", "parallel.tensor=8", "parallel.pipeline=1")
    fast, slow = (predict(config, cluster_of(4, between_gb=speed)) for speed in (50.0, 0.01))
    assert slow.tensor == fast.tensor > 0
    assert slow.data > fast.data
    split = config_of("opt13b", "parallel.tensor=40", "parallel.pipeline=1", "model.num_heads=40")
    assert predict(split, Cluster.of("a100-80gb", 8, 5)).tensor > fast.tensor, "tensor ranks on several nodes"


def test_bandwidth_of_groups() -> None:
    cluster = Cluster.of("h100-80gb", 8, 4, inside_gb=300, between_gb=40)
    assert cluster.bandwidth(range(8)) == 300e9
    assert cluster.bandwidth([0, 8, 16, 24]) == 40e9
    assert cluster.bandwidth([0, 4, 8, 12]) == 80e9, "two adapters on each node"
    assert cluster.bandwidth(range(32)) == 300e9, "no more than within"


def test_half_the_arithmetic_is_assumed_to_gain_less_than_the_peak_says() -> None:
    for gpu in GPU_MEMORY:
        times = Roofline(gpu, PEAKS)
        assert "not measured" in times.basis
        dense, sparse = (times.seconds(Product("forward", 8192, 8192, 8192, is_sparse)) for is_sparse in (False, True))
        assert 1 < dense / sparse < 2
        weight = [times.seconds(Product("weight gradient", 8192, 8192, 8192, is_sparse)) for is_sparse in (False, True)]
        assert weight[0] == weight[1], "dense for both"
        few = [times.seconds(Product("forward", 8, 8192, 8192, is_sparse)) for is_sparse in (False, True)]
        assert few[1] / few[0] == pytest.approx((1 + 1 / 8) / 2, rel=0.01), "what the weight takes in memory"


def gemm_rows(dtype: str = "bfloat16") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind in ("forward", "input gradient"):
        for tokens, seconds in ((512, 1.0), (8192, 8.0)):
            rivals = {"dense": {"seconds": seconds}, "dispatcher": {"seconds": seconds / 2}}
            rows.append(
                {
                    "cell": f"{kind} {tokens}",
                    "kind": kind,
                    "tokens": tokens,
                    "rows": 1024,
                    "columns": 4096,
                    "dtype": dtype,
                    "rivals": rivals,
                }
            )
    return rows


def test_what_is_measured_is_used() -> None:
    times = Measured(gemm_rows(), "made up")
    assert times.seconds(Product("forward", 8192, 1024, 4096, False)) == 8
    assert times.seconds(Product("input gradient", 8192, 1024, 4096, True)) == 4
    assert times.seconds(Product("weight gradient", 512, 1024, 4096, True)) == 1
    assert times.seconds(Product("forward", 8192, 2048, 4096, False)) == 16, "twice the work at the same speed"
    assert times.seconds(Product("forward", 600, 1024, 4096, False)) == pytest.approx(600 / 512), "the nearest tokens"


def test_a_file_is_of_this_card_and_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "gemm.json"
    content = {"benchmark": "gemm", "machine": {"device": "NVIDIA H200", "commit": "abc"}, "rows": gemm_rows()}
    path.write_text(json.dumps(content))
    times = read_measured(path, "h200-141gb", "bf16")
    assert kind_of("NVIDIA H200") == "h200-141gb" and str(path) in times.basis and "abc" in times.basis
    with pytest.raises(UserError, match='was measured on "NVIDIA H200", which is no a100-80gb'):
        read_measured(path, "a100-80gb", "bf16")
    for text, said in (
        ("{", "is no file of results of"),
        (json.dumps(content | {"benchmark": "block"}), 'is no file of results of "tools/benchmark.py gemm"'),
        (json.dumps(content | {"rows": gemm_rows()[:2]}), "has no dense and 2:4 products, forward and backward"),
        (
            json.dumps(content | {"rows": [{"tokens": 1, "dtype": "bfloat16"}]}),
            "has no dense and 2:4 products, forward and backward",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said) as refusal:
            read_measured(path, "h200-141gb", "bf16")
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_measured(tmp_path / "none", "h200-141gb", "bf16")


def test_only_rows_of_the_wanted_precision_count(tmp_path: Path) -> None:
    path = tmp_path / "gemm.json"
    slow = gemm_rows("float32")
    for row in slow:
        row["rivals"] = {"dense": {"seconds": 100.0}, "dispatcher": {"seconds": 100.0}}
    content = {"benchmark": "gemm", "machine": {"device": "NVIDIA H200"}}
    unmeasured = {"cell": "forward, large", "not_measured": "out of memory"}
    path.write_text(json.dumps(content | {"rows": [unmeasured, *gemm_rows(), *slow]}))
    wanted = Product("forward", 8192, 1024, 4096, False)
    assert read_measured(path, "h200-141gb", "bf16").seconds(wanted) == 8
    assert read_measured(path, "h200-141gb", "fp32").seconds(wanted) == 100
    with pytest.raises(
        UserError, match="nothing that was measured in float16, but in bfloat16, float32; the precision is"
    ):
        read_measured(path, "h200-141gb", "fp16")
    path.write_text(json.dumps(content | {"rows": [unmeasured]}))
    with pytest.raises(UserError, match="nothing that was measured in bfloat16; the"):
        read_measured(path, "h200-141gb", "bf16")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a100", 8, 4), "--gpu a100: unknown; it can be a100-40gb, "),
        (("a100-80gb", 0, 4), "--gpus-per-node 0: must be more than 0"),
        (("a100-80gb", 8, -1), "--nodes -1: must be more than 0"),
        (("a100-80gb", 8, 4, float("nan")), "--inside-gb nan: must be more than 0"),
        (("a100-80gb", 8, 4, None, 0.0), "--between-gb 0.0: must be more than 0"),
    ],
)
def test_a_cluster_that_cannot_be(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        Cluster.of(*arguments)
    assert str(refusal.value).startswith(said)
