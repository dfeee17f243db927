"""ZeRO 3: no rank ever holds more than two blocks whole, and all model state falls as 1 / ranks.

The real trainer runs a small OPT of six blocks with a save, the adapter switch, evaluation and a resume. All the while
a watch follows the storages that hold parameters or metadata whole: what the factory makes, what a collective gathers,
and copies of either, whoever keeps them (a module, an autograd graph, a buffer). At every collective and concatenation,
and at every layer made, those alive are added up. Sequences are short, so a copy of a weight could not hide among
activations: it is the lineage that counts, not the size.

Run: pytest -m slow tests/engine/test_bounded_memory.py
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slope_dist.config import load_config
from slope_dist.layers import logical_tensors
from slope_dist.parallel.environment import discover
from tests.distributed import run_ranks
from tests.runs import write_config

# Minutes on two cores.
pytestmark = pytest.mark.slow

BLOCKS = 6
STEPS = 6
FIRST_ADAPTER_STEP = 4

CHANGES: dict[str, Any] = {
    "parallel__zero_stage": 3,
    "model__hidden_size": 256,
    "model__ffn_size": 1024,
    "model__num_layers": BLOCKS,
    "model__sequence_length": 2,
    "training__steps": STEPS,
    "training__micro_batch_size": 1,
    "training__global_batch_size": 2,
    "adapters__fraction": 0.5,
    "evaluation__samples": 2,
    "checkpoint__interval": 2,
}
"""The table of tokens is a third of a block; DeepSpeed gathers ahead from its third step on."""

aten = torch.ops.aten
COPIES = {aten.cat.default, aten.clone.default, aten._to_copy.default, aten.copy_.default}


class WholeLog(TorchDispatchMode):
    """Adds up, while it is on, the live storages that hold a parameter whole; holds none of them itself.

    Attributes:
        phase: what the run is doing, set from outside. In a phase "build ..." all that is made counts as whole.
        peaks: largest sum of bytes by phase.
        shares: storages of a rank's own part of the state, by number; they are not whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "between"
        self.shares: set[int] = set()
        self._numbers: dict[int, tuple[StorageWeakRef, int]] = {}
        self._made = 0
        self._whole: set[int] = set()
        self._samples: list[tuple[str, dict[int, int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(group) if isinstance(leaf, Tensor)] for group in ((args, kwargs), result)
        )
        collective = func.namespace == "c10d"
        gathers = collective and ("gather" in func.__name__ or "broadcast" in func.__name__)
        if self.phase.startswith("build"):
            self._whole |= self._numbered([*inputs, *outputs])
        elif gathers:
            # Its output is among its arguments. Bytes by the other collectives are manifests.
            plain = "base" in func.__name__
            self._whole |= self._numbered(leaf for leaf in inputs if plain or leaf.is_floating_point())
        elif func in COPIES and self._numbered(inputs) & (self._whole - self.shares):
            self._whole |= self._numbered(outputs)
        if collective or func is aten.cat.default:
            self.sample()
        return result

    def sample(self) -> None:
        """Note what is alive and whole now."""
        alive = {}
        for key, (reference, number) in list(self._numbers.items()):
            if reference.expired():
                del self._numbers[key]
                self._whole.discard(number)
            elif number in self._whole and number not in self.shares:
                alive[number] = torch.UntypedStorage._new_with_weak_ptr(key).nbytes()
        self._samples.append((self.phase, alive))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """These are a rank's own part of the state, and have been since they were made."""
        self.shares |= self._numbered(tensors)

    def peaks(self) -> dict[str, int]:
        """Most bytes at once, by phase."""
        found: dict[str, int] = {}
        for phase, alive in self._samples:
            size = sum(size for number, size in alive.items() if number not in self.shares)
            found[phase] = max(size, found.get(phase, 0))
        return found

    def _numbered(self, tensors: Iterable[Tensor]) -> set[int]:
        """Numbers of the storages of parameters and what may hold them; addresses are used again, numbers are not."""
        numbers = set()
        for tensor in tensors:
            if tensor.is_floating_point() or tensor.dtype == torch.uint8:
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    reference, number = self._numbers.get(storage._cdata, (None, 0))
                    if reference is None or reference.expired():
                        self._made += 1
                        number = self._made
                        self._numbers[storage._cdata] = (StorageWeakRef(storage), number)
                    numbers.add(number)
        return numbers


def shares_of(engine: Any) -> Iterator[Tensor]:
    """All that a rank keeps of the state, and the bucket through which gradients travel."""
    optimizer = engine._engine.optimizer
    for parameter in engine.module.parameters():
        yield parameter.ds_tensor
    for group in engine._state.flat_parameters().values():
        for truth in group:
            yield truth
            yield from engine._adam.state[truth].values()
    yield optimizer.grad_partitions_flat_buffer
    yield from buckets_of(engine)


def buckets_of(engine: Any) -> list[Tensor]:
    found = engine._engine.optimizer.ipg_buckets.values()
    return [bucket.buffer for bucket in found if bucket.buffer is not None]


def block_bytes(engine: Any) -> int:
    """Bytes of the largest block, metadata included, on this tensor rank."""
    blocks: dict[str, int] = {}
    for tensor in logical_tensors(engine.module):
        if tensor.name.startswith("decoder.layers."):
            name = tensor.name.split(".")[2]
            blocks[name] = blocks.get(name, 0) + tensor.tensor.ds_numel * tensor.tensor.element_size()  # type: ignore
    assert len(blocks) == BLOCKS
    return max(blocks.values())


def watched_run(path: str, spoil: str | None = None) -> dict[str, Any]:
    """Train, then resume from the checkpoint before the last; most whole bytes by phase, and bytes of a block."""
    import slope_dist.training.build as building
    import slope_dist.training.trainer as training

    log = WholeLog()
    blocks: dict[str, int] = {}
    build, build_engine, save = building.build, training.build_engine, training.Saver.save

    def watched_build(config: Any, factory: Any, prepare: Any = None) -> nn.Module:
        def watched_prepare(layer: nn.Module) -> None:
            log.sample()
            prepare(layer)
            log.share(parameter.ds_tensor for parameter in layer.parameters())  # type: ignore[misc]

        # Without `prepare` DeepSpeed partitions the whole model, once it is there.
        return build(config, factory, None if prepare is None or spoil == "no prepare" else watched_prepare)

    def phased(phase: str, function: Any) -> Any:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            before, log.phase = log.phase, phase
            result = function(*arguments, **keywords)
            log.sample()
            log.phase = before
            log.sample()
            return result

        return wrapped

    def watched_build_engine(*arguments: Any, **keywords: Any) -> Any:
        kind = "adapters" if keywords["adapters"] else "sparse"
        engine = phased(f"build {kind}", build_engine)(*arguments, **keywords)
        log.share(shares_of(engine))
        blocks[kind] = block_bytes(engine)
        engine.load_state = phased("load", engine.load_state)
        engine.train_step = phased(f"train {kind}", engine.train_step)
        engine.evaluate = phased("evaluate", engine.evaluate)
        return engine

    if spoil == "gather far ahead":
        dictionary = building.deepspeed_dict

        def greedy(*arguments: Any, **keywords: Any) -> dict[str, Any]:
            settings = dictionary(*arguments, **keywords)
            for name in ("stage3_max_live_parameters", "stage3_prefetch_bucket_size"):
                settings["zero_optimization"][name] = 10**9
            return settings

        building.deepspeed_dict = greedy
    building.build = watched_build
    training.build_engine = watched_build_engine
    training.Saver.save = phased("save", save)  # type: ignore[method-assign]
    config = load_config(path)
    with log:
        trainer = training.Trainer(config, discover())
        trainer.run()
        if spoil is None:
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                assert trainer.last_checkpoint is not None
                shutil.rmtree(trainer.last_checkpoint)
            trainer.turn.release()
            torch.distributed.barrier()
            again = training.Trainer(config, discover())
            assert again.resumed_from is not None and again.adapters
            again.run()
            log.phase = "end"
            log.sample()
    return {"peaks": log.peaks(), "blocks": blocks}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (2, {}),
    "bf16": (2, {"precision": "bf16"}),
    "tensor 2": (4, {"precision": "bf16", "parallel__tensor": 2, "parallel__sequence_parallel": True}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rank_ever_holds_two_blocks_whole(name: str, corpus: Path, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[name]
    path = write_config(tmp_path, corpus, **CHANGES, **changes)
    for rank in run_ranks(watched_run, ranks, str(path)):
        peaks, block = rank["peaks"], rank["blocks"]["adapters"]
        assert set(peaks) == {
            "between",
            *(f"{what} {phase}" for what in ("build", "train") for phase in ("sparse", "adapters")),
            *("load", "evaluate", "save", "end"),
        }
        # A block is made in fp32, which is two of bf16.
        assert all(size < 2 * block for size in peaks.values()), peaks
        for moving in ("build", "train"):
            assert peaks[f"{moving} sparse"] > block / 2, "the watch has seen blocks"
        # Nothing adds up from block to block: what the forward pass has used of adapters, too, is let go.
        assert peaks["train adapters"] < 1.3 * block, peaks
        # What goes to disk, or comes from it, is what the rank owns; nothing outlives the engine that gathered it.
        # (Tables of 256 and 4096 bytes, by which metadata and masks are read, are made once, in the build or a load.)
        assert all(peaks[phase] <= 256 + 4096 for phase in ("save", "load", "between", "end")), peaks


@pytest.mark.parametrize(("spoil", "phase"), [("no prepare", "build sparse"), ("gather far ahead", "train sparse")])
def test_the_watch_would_see_more_than_two_blocks(spoil: str, phase: str, corpus: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, corpus, **CHANGES | {"adapters__rank": 0})
    for rank in run_ranks(watched_run, 2, str(path), spoil):
        assert rank["peaks"][phase] > 2.5 * rank["blocks"]["sparse"], rank


def engine_of(path: str) -> Any:
    """An engine of data ranks, and its micro-batches of one step."""
    from slope_dist.config import derive
    from slope_dist.parallel.groups import start
    from slope_dist.parallel.layout import Layout
    from slope_dist.training.build import build_engine

    config = load_config(path)
    ranks = torch.distributed.get_world_size()
    derived = derive(config, ranks)
    engine: Any = build_engine(config, derived, start(Layout(data=ranks)), adapters=False)
    tokens = torch.arange(derived.accumulation_steps * 3).view(-1, 1, 3)
    return engine, [(window[:, :-1], window[:, 1:]) for window in tokens]


def closed_engine(path: str) -> dict[str, int]:
    """Most whole bytes before and after an engine is closed that keeps small tensors whole."""
    log = WholeLog()
    with log:
        engine, micro_batches = engine_of(path)
        for phase in ("warm", "warm", "open"):
            log.phase = phase
            engine.train_step(micro_batches)
            log.share(shares_of(engine))
        engine.close()
        log.phase = "closed"
        log.sample()
    return log.peaks()


def test_a_closed_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path, **CHANGES | {"parallel__zero3_persistence_threshold": 10**6})
    for peaks in run_ranks(closed_engine, 2, str(path)):
        # The whole model: every tensor is small enough to be kept.
        assert peaks["open"] > 10 * 2**20
        assert peaks["closed"] <= 256


def kept_state(path: str) -> dict[str, int]:
    """Two steps; bytes of this rank between steps: by kind of state, and of all that is alive."""
    log = EverythingLog()
    with log:
        engine, micro_batches = engine_of(path)
        for step in (1, 2):
            engine.begin_step(step)
            assert engine.train_step(micro_batches).skipped is None
    optimizer = engine._engine.optimizer
    truths = [truth for group in engine._state.flat_parameters().values() for truth in group]
    metadata = {id(parameter.ds_tensor) for parameter in engine.module.parameters() if not parameter.requires_grad}
    shards = [parameter.ds_tensor for parameter in engine.module.parameters()]
    kinds = {
        "weights": [shard for shard in shards if id(shard) not in metadata],
        "metadata": [shard for shard in shards if id(shard) in metadata],
        "masters": truths,
        "moments": [engine._adam.state[truth][name] for truth in truths for name in ("exp_avg", "exp_avg_sq")],
        "gradients": [optimizer.grad_partitions_flat_buffer],
    }
    sizes = {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in kinds.items()}
    sizes["state"] = sum(sizes.values())
    sizes["bucket"] = sum(bucket.nbytes for bucket in buckets_of(engine))
    return sizes | {"alive": log.bytes(), "tensors": len(shards)}


class EverythingLog(TorchDispatchMode):
    """All storages that an operation has seen, alive or not."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._seen.setdefault(storage._cdata, StorageWeakRef(storage))
        return result

    def bytes(self) -> int:
        """Of those alive."""
        gc.collect()
        live = [key for key, reference in self._seen.items() if not reference.expired()]
        return sum(torch.UntypedStorage._new_with_weak_ptr(key).nbytes() for key in live)


def test_all_model_state_falls_as_one_over_the_ranks(tmp_path: Path) -> None:
    changes = CHANGES | {"precision": "bf16", "training__global_batch_size": 4}
    path = str(write_config(tmp_path, tmp_path, **changes))
    found = {ranks: run_ranks(kept_state, ranks, path) for ranks in (1, 2, 4)}
    alone = found[1][0]
    for ranks, sizes in found.items():
        for size in sizes:
            print(f"{ranks} ranks:", size)
            # Each tensor is padded to a multiple of the ranks: at most so many elements of each kind of state.
            padding = alone["tensors"] * (ranks - 1)
            for kind, bytes_an_element in (("weights", 2), ("metadata", 1), ("masters", 4), ("moments", 8)):
                whole = ranks * size[kind] - alone[kind]
                assert 0 <= whole <= padding * bytes_an_element, (ranks, kind)
            assert 0 <= ranks * size["state"] - alone["state"] <= padding * (2 + 4 + 8 + 4)
            # Nothing else of any size stays beside the state and the bucket, which is the same for every layout.
            assert size["bucket"] == alone["bucket"]
            assert size["alive"] - size["state"] - size["bucket"] < 0.02 * alone["state"]
