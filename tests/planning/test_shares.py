"""Every rank's share, laid out by arithmetic: shares add up to the model, are cut legally, and are drawn as its slices.

Run: pytest tests/planning/test_shares.py
The initial values of one OPT-66B rank, drawn for real (minutes): pytest tests/planning/test_shares.py -m slow -s
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.config import Config, derive, load_config
from slope_dist.layers import initialization, logical_tensors
from slope_dist.parallel.fragments import Rectangle
from slope_dist.planning import GPU_MEMORY, ModelState, ParameterCount, ShareSize, count_parameters, measure
from slope_dist.sparse import CompressedMatrix, Pattern
from slope_dist.training.build import build_share, count_state, stages, storage
from slope_dist.training.memory import needs_of
from tests.distributed import ROOT, run_ranks
from tests.runs import same_bits, write_config

NODE_MEMORY = 2**40
"""What nodes of 8 such cards have, or more."""

LARGE = ("opt13b", "opt30b", "opt66b")
MULTIPLE = 8


@dataclass(frozen=True)
class Held:
    """What one rank holds of one tensor."""

    shape: tuple[int, ...]
    rectangle: Rectangle
    owned: bool


@dataclass(frozen=True)
class Share:
    """What one rank holds."""

    count: ParameterCount
    size: ShareSize
    tensors: dict[str, Held]


def read(name: str, **parallel: Any) -> Config:
    """A shipped config, with another layout if one is given."""
    config = load_config(ROOT / f"configs/{name}.json")
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"gpus": None} | parallel)})


def ranks_of(config: Config) -> list[tuple[int, int]]:
    return [(t, p) for p in range(config.parallel.pipeline) for t in range(config.parallel.tensor)]


@cache
def shares_of(config: Config, adapters: bool) -> list[Share]:
    """The share of each tensor rank of each stage."""
    shares = []
    for tensor_rank, stage in ranks_of(config):
        share = build_share(config, derive(config), adapters=adapters, tensor_rank=tensor_rank, stage=stage)
        tensors = {t.name: Held(t.shape, t.rectangle, t.owned) for t in logical_tensors(share)}
        shares.append(Share(count_parameters(share), measure(share), tensors))
    return shares


def by_hand(config: Config, adapters: bool) -> ParameterCount:
    """OPT's parameters, from the published shape alone."""
    model, hidden, ffn = config.model, config.model.hidden_size, config.model.ffn_size
    matrices = model.num_layers * (4 * hidden**2 + 2 * hidden * ffn)
    pruned = matrices - 3 * hidden**2
    vectors = model.num_layers * (9 * hidden + ffn) + 2 * hidden
    tables = (model.vocab_size + model.sequence_length + 2) * hidden
    rank = config.adapter_rank if adapters else 0
    inputs_and_outputs = model.num_layers * (4 * 2 * hidden + 2 * (hidden + ffn)) - 3 * 2 * hidden
    added = rank * inputs_and_outputs
    return ParameterCount(
        total=matrices + vectors + tables + added,
        kept=pruned // 2,
        dense=3 * hidden**2 + vectors + tables + added,
        adapters=added,
        metadata=pruned // 8,
    )


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_the_shares_add_up_to_the_model(name: str, adapters: bool) -> None:
    config = read(name)
    total = sum((share.count for share in shares_of(config, adapters)), ParameterCount())
    assert total == by_hand(config, adapters)
    assert total == count_state(config, derive(config), adapters=adapters).parameters


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        *((name, {}) for name in LARGE),
        # Heads of 40, 56 and 72 over more ranks, and a vocabulary that does not divide.
        ("opt13b", {"tensor": 8, "pipeline": 1}),
        ("opt30b", {"tensor": 8, "pipeline": 3}),
        ("opt66b", {"tensor": 8, "pipeline": 4}),
        ("opt350m", {"tensor": 4, "pipeline": 5}),
    ],
)
def test_every_cut_is_legal_and_the_parts_tile_each_tensor(name: str, parallel: dict[str, int]) -> None:
    config = read(name, **parallel)
    head_size = config.model.hidden_size // config.model.num_heads
    [model] = shares_of(read(name, tensor=1, pipeline=1), adapters=True)
    shares = shares_of(config, adapters=True)
    assert {name for share in shares for name in share.tensors} == model.tensors.keys()
    for name, whole in model.tensors.items():
        parts = [share.tensors[name] for share in shares if name in share.tensors]
        assert {part.shape for part in parts} == {whole.shape}, name
        owned = sorted(part.rectangle for part in parts if part.owned)
        assert_tiles(owned, whole.shape, name)
        # What nobody counts is a copy of what somebody does.
        assert {part.rectangle for part in parts} == set(owned), name
        for rectangle in owned:
            for dim, (bounds, size) in enumerate(zip(rectangle, whole.shape, strict=True)):
                for cut in (place_in_matrix(name, dim, bound) for bound in bounds if bound not in (0, size)):
                    assert cut % (math.lcm(MULTIPLE, head_size) if is_heads(name, dim) else MULTIPLE) == 0, name
    for share in shares:
        for name, values in share.tensors.items():
            metadata = share.tensors.get(name.removesuffix("values") + "indices")
            if metadata is not None:
                rows, (left, right) = metadata.rectangle
                # A byte of metadata is 8 columns, of which 4 are kept.
                assert values.rectangle == (rows, (4 * left, 4 * right)), name


def assert_tiles(rectangles: list[Rectangle], shape: tuple[int, ...], name: str) -> None:
    """The rectangles, sorted, follow one another along one dimension and are whole in the others."""
    cut = [dim for dim, size in enumerate(shape) if any(r[dim] != (0, size) for r in rectangles)]
    assert len(cut) <= 1, name
    if not cut:
        assert rectangles == [tuple((0, size) for size in shape)], name
        return
    position = 0
    for rectangle in rectangles:
        assert rectangle[cut[0]][0] == position, (name, rectangles)
        position = rectangle[cut[0]][1]
    assert position == shape[cut[0]], (name, rectangles)


def place_in_matrix(name: str, dim: int, cut: int) -> int:
    """Where a cut of a stored tensor lies in the matrix that it stands for."""
    if dim == 1 and name.endswith(".indices"):
        return 8 * cut
    first_linears = tuple(f"decoder.layers.0.self_attn.{p}_proj.weight.values" for p in "qkv")
    sparse = name.endswith(".weight.values") and name not in first_linears and "project_" not in name
    return 2 * cut if dim == 1 and sparse else cut


def is_heads(name: str, dim: int) -> bool:
    """Whether a dimension of a tensor is the heads'."""
    if any(f".{p}_proj." in name for p in "qkv"):
        return dim == 0 and ".adapter.down" not in name
    return ".out_proj." in name and dim == 1 and ".adapter.up" not in name


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 32, 64])
@pytest.mark.parametrize("name", LARGE)
def test_no_rank_exceeds_the_memory_of_the_card(name: str, nodes: int) -> None:
    config = read(name)
    if 8 * nodes % (config.parallel.tensor * config.parallel.pipeline):
        assert name == "opt66b" and nodes < 4
        return
    derived = derive(config, 8 * nodes)
    assert config.parallel.gpu is not None
    memory = GPU_MEMORY[config.parallel.gpu]
    # Room for activations: half the card. Of the host, the copy for checkpoints and the state of the switch.
    needs = needs_of(config, derived, on_gpu=True)
    assert needs.waiting > 0 and 8 * (needs.copy + needs.waiting) < NODE_MEMORY
    for adapters, promised in ((False, needs.before), (True, needs.after)):
        shares = shares_of(config, adapters)
        states = [ModelState.of(share.size, storage(config, derived), derived.data_ranks) for share in shares]
        assert max(state.bytes for state in states) == promised
        assert promised < memory / 2


def test_bytes_of_a_share_by_hand() -> None:
    """OPT-66B, tensor 4 x pipeline 8, ZeRO 1 in bf16 over 2 data ranks: a middle stage is 8 equal blocks."""
    config = read("opt66b", tensor=4, pipeline=8)
    state = count_state(config, derive(config, 64), adapters=False).states[3]
    hidden, ffn = 9216, 36864
    matrices = 8 * (4 * hidden**2 + 2 * hidden * ffn) // 4
    # Biases of split outputs are split; those of out_proj and fc2, and the norms, are whole on each tensor rank.
    vectors = 8 * ((3 * hidden + ffn) // 4 + 6 * hidden)
    trained = matrices // 2 + vectors
    assert (state.weights, state.gradients, state.metadata) == (2 * trained, 4 * trained, matrices // 8)
    assert (state.masters, state.moments, state.transposes) == (4 * trained // 2, 8 * trained // 2, 0)
    # A GPU is named, so a library may keep the metadata once more, in its own order.
    assert state.kernel_metadata == matrices // 8
    assert state.bytes == 6 * trained + 2 * (matrices // 8) + 6 * trained
    assert state.carried == 6 * trained + matrices // 8


@pytest.mark.parametrize(
    ("kept", "parallel", "sparsity"),
    [
        (True, {"zero_stage": 1}, {}),
        (False, {"zero_stage": 1}, {"kernels": "reference"}),
        (False, {"zero_stage": 1}, {"vendors": ()}),
        (False, {"zero_stage": 3}, {}),
        (False, {"engine": "fsdp"}, {}),
    ],
    ids=["ZeRO 1", "reference", "no library", "ZeRO 3", "FSDP2"],
)
def test_a_library_keeps_metadata_only_of_whole_weights(kept: bool, parallel: dict, sparsity: dict) -> None:
    config = read("opt6.7b", pipeline=1, gpu="a100-80gb", **parallel)
    config = config.model_copy(update={"sparsity": config.sparsity.model_copy(update=sparsity)})
    state = count_state(config, derive(config, 8), adapters=False).heaviest
    assert state.metadata > 0 and (state.kernel_metadata > 0) == kept


def test_fsdp_divides_everything_and_its_weights_are_the_masters() -> None:
    config = read("opt30b", tensor=4, pipeline=1, engine="fsdp", zero_stage=0)
    one, many = (count_state(config, derive(config, 4 * data), adapters=False) for data in (1, 16))
    [trained] = {share.trained for share in (*one.shares, *many.shares)}
    state = one.heaviest
    assert (state.weights, state.gradients, state.masters, state.moments) == (
        4 * trained,
        4 * trained,
        0,
        8 * trained,
    )
    # The weights wait at the switch: there is no other fp32 copy.
    assert state.carried == state.weights + state.moments + state.metadata
    assert many.heaviest.bytes == pytest.approx(state.bytes / 16, rel=1e-6)


def test_stages_are_balanced_and_adapters_move_no_layer() -> None:
    config = read("opt66b")
    assert stages(config, derive(config)) == [0, 9, 17, 25, 33, 41, 49, 57, 66]
    for pattern in ("dense", "2:4"):
        sparsity = config.sparsity.model_copy(update={"pattern": pattern})
        other = config.model_copy(update={"sparsity": sparsity})
        assert stages(other, derive(other)) == stages(config, derive(config))


def test_ranks_that_the_layout_does_not_have() -> None:
    config = read("opt13b")
    for place in ({"tensor_rank": 2}, {"stage": 2}, {"stage": -1}):
        with pytest.raises(ValueError, match="of 2"):
            build_share(config, derive(config), adapters=False, **place)


def test_drawn_shares_are_slices_of_the_model(tmp_path: Path) -> None:
    # Blocks of 256 x 256 are cut by the shares, and the vocabulary is padded.
    path = write_config(
        tmp_path, tmp_path, model__hidden_size=320, model__ffn_size=640, model__vocab_size=500, model__num_layers=3
    )
    alone = load_config(path)
    whole = build_share(alone, derive(alone), adapters=True, device="cpu")
    model = {t.name: t.tensor.detach() for t in logical_tensors(whole)}
    shared = load_config(path, ["parallel.tensor=4", "parallel.pipeline=2"])
    seen = set()
    for tensor_rank, stage in ranks_of(shared):
        share = build_share(shared, derive(shared), adapters=True, tensor_rank=tensor_rank, stage=stage, device="cpu")
        for t in logical_tensors(share):
            part = model[t.name][tuple(slice(*bounds) for bounds in t.rectangle)]
            held = t.tensor.detach()
            assert same_bits(held[: part.shape[0]], part), t.name
            assert not held[part.shape[0] :].any(), t.name
            seen.add(t.name)
    assert seen == model.keys()


def draw_share(name: str, tensor_rank: int, stage: int) -> dict[str, Any]:
    """Draw one rank's initial values as its engine takes them, in bf16 a layer at a time; seconds and bytes."""
    from slope_dist.training.progress import PeakMemory

    config = read(name)
    derived = derive(config)
    start, busy = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        share = build_share(
            config,
            derived,
            adapters=False,
            tensor_rank=tensor_rank,
            stage=stage,
            device="cpu",
            prepare=lambda layer: layer.to(torch.bfloat16),
        )
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    tensors = list(logical_tensors(share))
    weights = sum(t.tensor.numel() * t.tensor.element_size() for t in tensors if t.trained)
    metadata = sum(t.tensor.numel() for t in tensors if not t.trained)
    assert all(bool(t.tensor.isfinite().all()) for t in tensors if t.trained)
    # The last rows of a layer in the middle of the share, drawn again by themselves.
    name = f"decoder.layers.{4 + 8 * stage}.fc1.weight"
    parts = {t.name: t for t in tensors if t.name.startswith(name)}
    values, indices = parts[f"{name}.values"], parts[f"{name}.indices"]
    _, last_row = values.rectangle[0]
    rows = (last_row - 16, last_row)
    model = config.model
    drawn = initialization.normal(config.run.seed, name, (model.ffn_size, model.hidden_size), model.init_std, rows)
    expected = CompressedMatrix.prune(drawn, Pattern.parse("2:4"))
    return {
        "seconds": seconds,
        "processor": busy,
        "peak": peak.bytes,
        "weights": weights,
        "metadata": metadata,
        "same": same_bits(values.tensor[-16:].detach(), expected.values.bfloat16())
        and same_bits(indices.tensor[-16:], expected.indices),
    }


@pytest.mark.slow
def test_the_initial_values_of_one_opt_66b_rank_are_drawn() -> None:
    config = read("opt66b")
    assert (config.parallel.tensor, config.parallel.pipeline) == (4, 8)
    [found] = run_ranks(draw_share, 1, "opt66b", 1, 0, timeout=1800)
    gib = {key: found[key] / 2**30 for key in ("weights", "metadata", "peak")}
    sizes = ", ".join(f"{key} {size:.2f}" for key, size in gib.items())
    times = f"{found['seconds']:.0f} s, of which {found['processor']:.0f} s on one processor"
    print(f"\nOPT-66B, tensor rank 1 of 4, stage 0 of 8: {times}; GiB: {sizes} above what was used before")
    promised = count_state(config, derive(config), adapters=False).states[0]
    assert (found["weights"], found["metadata"]) == (promised.weights, promised.metadata)
    assert found["same"]
    # The share itself, and one layer of it in fp32 with what pruning it takes: not the share in fp32.
    assert found["peak"] < 2 * (promised.weights + promised.metadata)
