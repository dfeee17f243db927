"""Copies that several ranks hold are equal in every bit in every layout, and one flipped bit is found and named.

Runs of the real trainer with the adapter switch in their middle compare after each step. Most layouts are marked
slow here; those of tests/layouts compare too.

Run: pytest tests/comparing/test_drift.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.comparing import drift
from slope_dist.comparing.drift import CHUNK, Comparison, content_hash
from slope_dist.parallel.fragments import Fragment, whole
from slope_dist.training.guards import RunFailedError
from tests.distributed import run_ranks
from tests.runs import rows_of, train, watch_engines, write_config

STEPS = 6
FLIPPED_AFTER = 3
"""Steps; the next comparison, of every second step, is after step 4."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 0": (2, {"zero_stage": 0}),
    "zero 1": (2, {"zero_stage": 1}),
    "zero 2": (2, {"zero_stage": 2}),
    "zero 3": (2, {"zero_stage": 3}),
    "zero 3, small tensors whole": (2, {"zero_stage": 3, "zero3_persistence_threshold": 100}),
    "fsdp": (2, {"engine": "fsdp"}),
    "tensor": (2, {"tensor": 2}),
    "sequence parallel": (2, {"tensor": 2, "sequence_parallel": True}),
    "sequence parallel, zero 0": (2, {"tensor": 2, "sequence_parallel": True, "zero_stage": 0}),
    "pipeline": (2, {"pipeline": 2}),
    "pipeline, zero 0": (2, {"pipeline": 2, "zero_stage": 0}),
    "data x tensor": (4, {"tensor": 2}),
    "data x tensor, zero 0": (4, {"tensor": 2, "zero_stage": 0}),
    "data x tensor, zero 2, sequence parallel": (4, {"tensor": 2, "zero_stage": 2, "sequence_parallel": True}),
    "data x tensor, zero 3, sequence parallel": (4, {"tensor": 2, "zero_stage": 3, "sequence_parallel": True}),
    "data x tensor, fsdp, sequence parallel": (4, {"tensor": 2, "engine": "fsdp", "sequence_parallel": True}),
    "data x pipeline": (4, {"pipeline": 2}),
    "data x pipeline, zero 0": (4, {"pipeline": 2, "zero_stage": 0}),
    "tensor x pipeline, sequence parallel": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
}
QUICK = ("sequence parallel",)
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


def config_of(folder: Path, corpus: Path, layout: str, **changes: Any) -> tuple[int, Path]:
    ranks, parallel = LAYOUTS[layout]
    keys = {f"parallel__{key}": value for key, value in parallel.items()}
    defaults = {"training__steps": STEPS, "evaluation__samples": 2, "watch__straggler_interval": 0}
    return ranks, write_config(folder, corpus, **defaults | keys | changes)


def compared_run(config: str, flip: list[str] | None = None, rank: int = 0) -> list[list[Any]]:
    """Train; for each comparison its step, the keys this rank hashed, and what it found.

    After step `FLIPPED_AFTER` one bit of the tensor `flip`, (kind, name), is flipped on `rank`.
    """
    compare, hashed = drift.compare, drift.content_hash
    seen: list[list[Any]] = []
    steps, names = 0, []

    def watched(held: Any) -> Comparison:
        nonlocal names
        fragments = list(held)
        memory = {f.tensor.data_ptr(): f"{f.kind}/{f.name}" for f in fragments}
        names = []

        def named(tensor: torch.Tensor) -> torch.Tensor:
            names.append(memory[tensor.data_ptr()])
            return hashed(tensor)

        drift.content_hash = named
        found = compare(fragments)
        rows = [[d.kind, d.tensor, list(d.ranks), d.copies] for d in found.differences]
        seen.append([steps, names, found.compared, rows])
        return found

    def watch(event: str, engine: Any, step: Any) -> None:
        nonlocal steps
        if event != "after step":
            return
        steps = step
        if flip is not None and step == FLIPPED_AFTER and torch.distributed.get_rank() == rank:
            tensor = next(f.tensor for f in engine.held() if [f.kind, f.name] == flip)
            # As small as a change can be; of a float not the lowest bit, which the next step may round away.
            tensor.view(-1).view(torch.uint8)[0] ^= 1 if tensor.dtype == torch.uint8 else 16

    drift.compare = watched
    watch_engines(watch)
    train(config)
    return seen


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", EACH)
def test_copies_are_equal(corpus: Path, tmp_path: Path, layout: str, precision: str) -> None:
    changes: dict[str, Any] = {"precision": precision, "watch__drift_interval": 1, "sparsity__column_mask_interval": 3}
    if layout.endswith("zero 0") and precision == "bf16":
        changes["parallel__zero_stage"] = 1
    ranks, config = config_of(tmp_path, corpus, layout, **changes)
    seen = run_ranks(compared_run, ranks, str(config))
    for own in seen:
        assert [row[0] for row in own] == list(range(1, STEPS + 1))
        assert all(row[3] == [] for row in own)
    assert not any("drift" in row for row in rows_of(tmp_path / "run"))
    assert_expected_names(layout, precision, [set(own[-1][1]) for own in seen])


def assert_expected_names(layout: str, precision: str, hashed: list[set[str]]) -> None:
    """That what is replicated was hashed, on every rank: an empty comparison finds no difference either."""
    parallel = LAYOUTS[layout][1]
    data = LAYOUTS[layout][0] // parallel.get("tensor", 1) // parallel.get("pipeline", 1)
    sharded = parallel.get("engine") == "fsdp" or parallel.get("zero_stage") == 3
    first, last = hashed[0], hashed[-1]
    if data > 1 and not sharded:
        assert {"weight/decoder.layers.0.fc1.weight.values", "metadata/decoder.layers.0.fc1.weight.indices"} <= first
        assert {"metadata/decoder.layers.0.fc1.weight.column_mask", "weight/decoder.layers.0.fc1.adapter.up"} <= first
    if parallel.get("tensor", 1) > 1:
        weight = "weight" if precision == "fp32" or not sharded or "engine" not in parallel else "master"
        assert f"{weight}/decoder.layers.0.self_attn_layer_norm.bias" in first
        assert {f"{weight}/decoder.layers.0.fc1.adapter.down", f"{weight}/decoder.layers.0.fc2.bias"} <= first
        assert "exp_avg/decoder.layers.0.self_attn_layer_norm.bias" in first
        assert data > 1 or f"{weight}/decoder.layers.0.fc1.weight.values" not in first
    if parallel.get("pipeline", 1) > 1:
        assert "weight/decoder.embed_tokens.weight" in first & last
    if parallel.get("zero_stage") == 0 and precision == "fp32":
        assert any(name.startswith("exp_avg/") for name in first)
    if sharded and data == LAYOUTS[layout][0] and "whole" not in layout:
        assert first == set()
    if "whole" in layout:
        assert "weight/decoder.layers.0.fc2.bias" in first


FLIPS = [
    pytest.param("zero 0", "exp_avg", "decoder.layers.1.fc1.weight.values", 1, [0, 1], id="moment"),
    pytest.param("zero 1", "metadata", "decoder.layers.0.fc1.weight.indices", 1, [0, 1], id="index"),
    pytest.param("sequence parallel", "exp_avg", "decoder.layers.1.final_layer_norm.weight", 0, [0, 1], id="norm"),
    pytest.param("pipeline, zero 0", "weight", "decoder.embed_tokens.weight", 1, [0, 1], id="tied table"),
    pytest.param(
        "data x tensor, zero 0",
        "exp_avg_sq",
        "decoder.layers.0.fc2.bias",
        2,
        [2],
        id="one of 4",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "data x tensor", "metadata", "decoder.layers.0.fc2.weight.indices", 3, [1, 3], id="pair", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("layout", "kind", "name", "rank", "named"), FLIPS)
def test_a_flipped_bit_is_found_at_the_next_comparison(
    corpus: Path, tmp_path: Path, layout: str, kind: str, name: str, rank: int, named: list[int]
) -> None:
    ranks, config = config_of(tmp_path, corpus, layout, watch__drift_interval=2, adapters__rank=0)
    for own in run_ranks(compared_run, ranks, str(config), [kind, name], rank):
        found = {row[0]: row[3] for row in own}
        assert found[FLIPPED_AFTER - 1] == []
        assert [kind, name, named, 4 if len(named) == 1 else 2] in found[FLIPPED_AFTER + 1]
    rows = [row for row in rows_of(tmp_path / "run") if "drift" in row]
    assert rows[0]["step"] == FLIPPED_AFTER + 1
    assert rows[0]["drift"]["last_equal_step"] == FLIPPED_AFTER - 1
    assert rows[0]["drift"]["tensors"] == len(found[FLIPPED_AFTER + 1])
    assert len(rows[0]["drift"]["shown"][0]["hosts"]) == 1


def stopped_run(config: str) -> list[str]:
    """How a run ends whose rank 1 has a bit flipped."""
    try:
        compared_run(config, ["metadata", "decoder.layers.0.fc2.weight.indices"], 1)
    except RunFailedError as error:
        return [str(error)]
    return []


def test_a_run_that_is_to_stop_stops_before_it_saves(corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"watch__drift_interval": 1, "watch__on_drift": "stop", "checkpoint__interval": 1}
    ranks, config = config_of(tmp_path, corpus, "zero 1", **changes)
    for own in run_ranks(stopped_run, ranks, str(config)):
        assert len(own) == 1 and "metadata decoder.layers.0.fc2.weight.indices differ: ranks 0, 1 of 2" in own[0]
        assert own[0].endswith("equal after step 2")
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert saved == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_every_flipped_bit_changes_the_hash(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 256, (24,), dtype=torch.uint8).view(dtype)
    hashes = {int(content_hash(tensor))}
    for byte in range(24):
        for bit in range(8):
            changed = tensor.clone()
            changed.view(torch.uint8)[byte] ^= 1 << bit
            hashes.add(int(content_hash(changed)))
    assert len(hashes) == 1 + 24 * 8


def test_places_count_across_chunks() -> None:
    tensor = torch.zeros(2 * CHUNK + 3)
    hashes = set()
    for place in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 2):
        tensor.zero_()
        tensor[place] = 1.0
        hashes.add(int(content_hash(tensor)))
    assert len(hashes) == 7
    # Signs alone, which differ in the highest bit of an element.
    pairs = torch.ones(200)
    signs = set()
    for place in range(199):
        pairs.fill_(1.0)
        pairs[place : place + 2] = -1.0
        signs.add(int(content_hash(pairs)))
    assert len(signs) == 199


def uneven(without: int) -> list[Any]:
    """Compare tensors of which one rank holds fewer, and another only one; rank `without` has none of them right."""
    rank = torch.distributed.get_rank()
    held = {name: torch.full((4,), float(index)) for index, name in enumerate("abcd"[: 4 - rank])}
    if rank == without:
        held["a"][2] += 1
    made = [Fragment(name, "weight", (4,), whole((4,)), 0, 4, tensor) for name, tensor in held.items()]
    found = drift.compare(made)
    return [found.compared, [[d.tensor, list(d.ranks), d.copies] for d in found.differences]]


@pytest.mark.parametrize("without", [0, 2])
def test_ranks_may_hold_different_numbers_of_tensors(without: int) -> None:
    assert run_ranks(uneven, 3, without) == [[3, [["a", [without], 3]]]] * 3
