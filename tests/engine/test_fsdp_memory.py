"""FSDP: no rank ever has more than two blocks whole, and all model state falls as 1 / ranks.

Between any two operations of building, stepping, refreshing masks, evaluating, saving, loading and switching, two
things are looked at: which blocks FSDP holds gathered, and the bytes of all live storages, whoever holds them. The
first must never be more than two blocks; what the second says beside the state must be the same for three blocks and
for six. Beside the blocks, what the embedding and the head hold is whole while a step or an evaluation lasts.

Run: pytest -m slow tests/engine/test_fsdp_memory.py
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slope_dist import checkpoint
from slope_dist.config import derive, load_config
from slope_dist.layers import logical_tensors
from slope_dist.parallel.fragments import MemorySource
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.runs import VOCAB_SIZE, write_config

# Minutes on two cores.
pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "parallel__engine": "fsdp",
    "sparsity__column_mask_interval": 2,
    "model__hidden_size": 128,
    "model__ffn_size": 256,
    "model__sequence_length": 8,
    "training__recompute": "blocks",
    "training__micro_batch_size": 1,
}
"""A block of 270 KiB in fp32, beside which the 4 KiB of activations kept for it are small."""

DEPTHS = (3, 6)
TIMEOUT = 300.0
LOOSE = 1024
"""Bytes of losses, norms and the like that a rank may hold on to."""


class Watch(TorchDispatchMode):
    """While it is on: most blocks gathered and most live bytes at once, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self.engine: Any = None
        self.blocks: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._gathers: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        grown = func.namespace in ("c10d", "fsdp")
        for leaf in tree_leaves(result):
            # A distributed tensor's own storage is a size and no memory; what it wraps was seen when it was made.
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                storage = leaf.untyped_storage()
                known = self._storages.get(storage._cdata)
                if known is None or known.expired():
                    self._storages[storage._cdata] = StorageWeakRef(storage)
                    grown |= storage.nbytes() >= 1024
        # Peaks are where something has grown: after an allocation, or an operation for which FSDP refills its own.
        if grown and self.phase is not None:
            self.bytes[self.phase] = max(self.live_bytes(), self.bytes.get(self.phase, 0))
            if self.engine is not None:
                self.blocks[self.phase] = max(self.gathered_blocks(), self.blocks.get(self.phase, 0))
        return result

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        self.phase = phase
        yield
        self.phase = None
        gc.collect()

    def live_bytes(self) -> int:
        """Of all storages made since the watch began; a storage FSDP has emptied has none."""
        total = 0
        for key, reference in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
            else:
                total += torch.UntypedStorage._new_with_weak_ptr(key).nbytes()
        return total

    def gathered_blocks(self) -> int:
        """Blocks whose values are whole, or lie whole in the buffer of a collective."""
        whole: set[int] = set()
        for index, block in enumerate(self.engine._units[:-1]):
            group = block._get_fsdp_state()._fsdp_param_group
            if group._all_gather_result is not None:
                self._gathers[id(group._all_gather_result.all_gather_output)] = index
                whole.add(index)
            outputs = [output for parameter in group.fsdp_params for output in parameter.all_gather_outputs]
            if any(output.untyped_storage().nbytes() for output in outputs):
                whole.add(index)
            # Of the last gather in forward the buffer stays until the next has begun.
            kept = getattr(group.comm_ctx, "all_gather_state", None)
            if kept is not None and id(kept.all_gather_result.all_gather_output) in self._gathers:
                whole.add(self._gathers[id(kept.all_gather_result.all_gather_output)])
        return len(whole)


class Training:
    """An engine of a config, built and driven as the trainer does."""

    def __init__(self, path: str) -> None:
        self.config = load_config(path)
        self.derived = derive(self.config, torch.distributed.get_world_size())
        self.groups = start_groups(Layout(self.config.parallel.tensor, self.derived.data_ranks))
        self.engine: Any = None
        self.number = 0

    def build(self, *, adapters: bool = False, draw: bool = True) -> None:
        from slope_dist.training.build import build_engine

        self.engine = build_engine(self.config, self.derived, self.groups, adapters=adapters, draw=draw)
        self.engine.set_learning_rates({"base": 0.001, "adapters": 0.001})

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(9).view(1, 9) * 7 % VOCAB_SIZE
        return tokens[:, :-1], tokens[:, 1:]

    def step(self) -> None:
        assert self.engine.train_step([self.batch] * 2).skipped is None

    def switch(self) -> None:
        fragments, scalars = self.engine.export_state()
        source = MemorySource.take(fragments, scalars)
        self.engine.close()
        self.engine = None
        self.build(adapters=True, draw=False)
        self.engine.load_state(source, new_adapters=True)

    def block_bytes(self) -> int:
        """Bytes of a pruned block, metadata included."""
        tensors = [tensor for tensor in logical_tensors(self.engine.module) if "decoder.layers.1." in tensor.name]
        return sum(tensor.tensor.numel() * tensor.tensor.element_size() for tensor in tensors)


def watched_phases(path: str, keep_whole: bool = False) -> dict[str, Any]:
    """A short training with everything in it; `keep_whole` leaves blocks gathered between forward and backward."""
    training = Training(path)
    # What torch makes once in a process is not the engine's.
    gc.collect()
    with Watch() as watch:
        with watch.during("build"):
            training.build()
        engine = watch.engine = training.engine
        if keep_whole:
            engine.module.set_reshard_after_forward(False)
        with watch.during("first step"):
            training.step()
        state = watch.live_bytes()
        with watch.during("step"):
            training.step()
        assert abs(watch.live_bytes() - state) < LOOSE, f"a step leaves {watch.live_bytes() - state} bytes behind"
        if keep_whole:
            return {"blocks": watch.blocks, "bytes": watch.bytes, "state": state, "block": training.block_bytes()}
        with watch.during("refresh"):
            engine.begin_step(3)
        with watch.during("evaluate"):
            engine.evaluate(training.batch)
        folder = Path(path).parent / "saved"
        with watch.during("save"):
            saved = checkpoint.save(folder, 2, *engine.export_state(), {}, {})
        with watch.during("load"):
            engine.load_state(checkpoint.Checkpoint.open(saved.path))
        assert abs(watch.live_bytes() - state) < LOOSE, f"the rest leaves {watch.live_bytes() - state} bytes behind"
        watch.engine = None
        del engine
        block = training.block_bytes()
        with watch.during("switch"):
            training.switch()
        after = watch.live_bytes()
        watch.engine = training.engine
        with watch.during("step with adapters"):
            training.step()
        watch.engine = None
        training.engine.close()
        gc.collect()
        left = watch.live_bytes()
    return {
        "blocks": watch.blocks,
        "bytes": watch.bytes,
        "state": state,
        "state after": after,
        "left": left,
        "block": block,
    }


def phases_by_depth(tmp_path: Path, ranks: int, *arguments: Any, **changes: Any) -> list[dict[str, Any]]:
    """What rank 0 saw, for each of `DEPTHS`."""
    found = []
    for depth in DEPTHS:
        path = write_config(tmp_path / str(depth), tmp_path, **SIZES, **changes, model__num_layers=depth)
        found.append(run_ranks(watched_phases, ranks, str(path), *arguments, timeout=TIMEOUT)[0])
    return found


def growth(shallow: dict[str, Any], deep: dict[str, Any], phase: str, state: str = "state") -> float:
    """Blocks' worth of bytes that a phase needs more, beside the state, for each block more."""
    beside = [seen["bytes"][phase] - seen[state] for seen in (shallow, deep)]
    return (beside[1] - beside[0]) / shallow["block"] / (DEPTHS[1] - DEPTHS[0])


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(4, {}), (2, {"precision": "bf16"}), (4, {"parallel__tensor": 2})],
    ids=["data 4", "data 2 in bf16", "tensor 2 x data 2"],
)
def test_no_more_than_two_blocks_are_ever_whole(ranks: int, changes: dict[str, Any], tmp_path: Path) -> None:
    shallow, deep = phases_by_depth(tmp_path, ranks, **changes)
    data_ranks = ranks // changes.get("parallel__tensor", 1)
    # One in use, one on its way. Neither saving nor loading gathers.
    most = {"first step": 2, "step": 2, "step with adapters": 2, "evaluate": 2, "refresh": 1, "save": 0, "load": 0}
    for seen in (shallow, deep):
        assert {phase: seen["blocks"][phase] for phase in most if seen["blocks"][phase] > most[phase]} == {}
        assert seen["blocks"]["step"] == 2 and seen["blocks"]["evaluate"] >= 1 and seen["blocks"]["refresh"] == 1
    for phase in ("refresh", "evaluate", "load"):
        assert growth(shallow, deep, phase) < 0.02, phase
    # Each block more has its own sharded gradients until the update: fp32, as large as the shard.
    sharded = 1 / data_ranks
    for phase in ("first step", "step"):
        assert 0 < growth(shallow, deep, phase) < sharded + 0.1, phase
    # In bf16 a save makes this rank's weights of its masters: half as large as those.
    assert growth(shallow, deep, "save") < (0.55 * sharded if changes.get("precision") == "bf16" else 0.02)
    # At the switch the old state waits while the new one is built.
    old = (deep["state"] - shallow["state"]) / shallow["block"] / (DEPTHS[1] - DEPTHS[0])
    assert growth(shallow, deep, "switch", "state after") < old + 0.02


def test_blocks_that_stayed_whole_would_be_found(tmp_path: Path) -> None:
    shallow, deep = phases_by_depth(tmp_path, 4, True)
    assert (shallow["blocks"]["step"], deep["blocks"]["step"]) == DEPTHS
    assert growth(shallow, deep, "step") > 1


def bytes_at_arrival(path: str, leave_whole: bool) -> dict[str, Any]:
    """Live bytes whenever the model under construction gives the engine another layer."""
    from slope_dist.engine.fsdp_engine import LayerSharder

    shard, finish = LayerSharder.__call__, LayerSharder.finish
    seen: list[int] = []
    finished = 0
    training = Training(path)
    gc.collect()
    with Watch() as watch:

        def arrive(self: LayerSharder, layer: torch.nn.Module) -> None:
            gc.collect()
            seen.append(watch.live_bytes())
            if not leave_whole:
                shard(self, layer)

        def end(self: LayerSharder, model: torch.nn.Module) -> None:
            nonlocal finished
            finish(self, model)
            gc.collect()
            finished = watch.live_bytes()

        LayerSharder.__call__, LayerSharder.finish = arrive, end  # type: ignore[method-assign]
        training.build()
    tensors = [tensor.tensor for tensor in logical_tensors(training.engine.module)]
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {"arrivals": seen, "block": training.block_bytes(), "finished": finished, "whole": whole}


@pytest.mark.parametrize("leave_whole", [False, True])
def test_a_layer_is_sharded_before_the_next_is_made(leave_whole: bool, tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path, **SIZES, model__num_layers=6)
    for rank in run_ranks(bytes_at_arrival, 4, str(path), leave_whole, timeout=TIMEOUT):
        # The embedding, six blocks, of which the first has dense layers, and the head.
        arrivals = rank["arrivals"]
        assert len(arrivals) == 1 + 6 + 1
        rises = [after - before for before, after in pairwise(arrivals[2:-1])]
        share = rank["block"] if leave_whole else rank["block"] / 4
        assert max(abs(rise - share) for rise in rises) < 0.02 * rank["block"], rises
        # The factory still names the table of tokens; that would be whole, had nobody sharded it.
        assert (rank["finished"] == pytest.approx(rank["whole"] / 4, rel=0.01)) != leave_whole


def state_bytes(path: str) -> int:
    """All live bytes after a step: values, metadata, moments, and whatever else there might be."""
    training = Training(path)
    gc.collect()
    with Watch() as watch:
        training.build()
        training.step()
        training.engine.evaluate(training.batch)
        gc.collect()
        return watch.live_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_model_state_falls_as_one_over_ranks(precision: str, tmp_path: Path) -> None:
    path = str(write_config(tmp_path, tmp_path, **SIZES, precision=precision))
    config = load_config(path)
    [alone] = run_ranks(state_bytes, 1, path, timeout=TIMEOUT)
    from slope_dist.training.build import build, layer_factory

    tensors = list(logical_tensors(build(config, layer_factory(config, derive(config), adapters=False, device="meta"))))
    # Masters and two moments in fp32, metadata in bytes: the model's own copy in bf16 is gone between steps.
    expected = sum(tensor.tensor.numel() * (12 if tensor.trained else 1) for tensor in tensors)
    # A step counter and the loss are not sharded: a number or two for each tensor.
    loose = 8 * len(tensors)
    assert expected <= alone <= expected + loose
    # Over four ranks the ten positions are 3, 3, 3, 1: shares in values, masters and moments differ by so much.
    padding = {2: 0, 4: 2 * 128 * 12}
    for ranks in (2, 4):
        for found in run_ranks(state_bytes, ranks, path, timeout=TIMEOUT):
            assert abs(found - expected / ranks) <= padding[ranks] + loose


def bytes_of_rebuilds(path: str) -> list[int]:
    """Live bytes after each of some rebuilds by way of the switch, and after the last engine was closed."""
    training = Training(path)
    gc.collect()
    found = []
    with Watch() as watch:
        training.build()
        for _ in range(3):
            training.step()
            training.switch()
            gc.collect()
            found.append(watch.live_bytes())
        training.engine.close()
        training.engine = None
        gc.collect()
        found.append(watch.live_bytes())
    return found


def test_a_closed_engine_leaves_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path, **SIZES)
    for *rebuilt, closed in run_ranks(bytes_of_rebuilds, 2, str(path), timeout=TIMEOUT):
        assert max(rebuilt) - min(rebuilt) < LOOSE < 500_000 < rebuilt[0]
        assert closed < LOOSE
