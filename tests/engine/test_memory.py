"""Rules R1 and R2 under the real engine: between steps no dense form of a pruned weight lives, nor a byte mask.

DeepSpeed trains three steps of a small OPT. After each, on every rank, everything live is looked at twice, as in
tests/models/test_memory.py: the tensors in the garbage collector's list, and the storages made since the beginning,
whoever holds them. The same runs measure bits an element of a pruned weight: what a rank keeps of the weight, what
autograd returns as its gradient, what is kept to accumulate it, masters and moments.

Run: pytest tests/engine/test_memory.py
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.config import derive, load_config
from slope_dist.layers import logical_tensors
from slope_dist.parallel.layout import Layout
from slope_dist.sparse import SparseWeight
from tests.distributed import run_ranks
from tests.models.test_memory import SHAPE, StorageLog, live_tensors, of_pruned_size, pruned_sizes
from tests.runs import write_config

STEPS = 3

SIZES: dict[str, Any] = {
    "model__hidden_size": SHAPE.hidden_size,
    "model__ffn_size": SHAPE.ffn_size,
    "model__vocab_size": SHAPE.vocab_size,
    "model__sequence_length": SHAPE.sequence_length,
}
"""In which a pruned weight's shape and element count are its own."""


class Training:
    """An engine, and what it may keep between steps."""

    def __init__(self, path: str) -> None:
        from slope_dist.parallel.groups import start
        from slope_dist.training.build import build_engine

        config = load_config(path)
        ranks = torch.distributed.get_world_size()
        derived = derive(config, ranks)
        self.engine: Any = build_engine(config, derived, start(Layout(data=ranks)), adapters=False)
        self.engine.set_learning_rates({"base": config.training.learning_rate})
        self.micro_batches = derived.accumulation_steps
        self.shape = (config.training.micro_batch_size, SHAPE.sequence_length + 1)
        self.generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        self.returned: set[float] = set()
        for weight in self.sparse_weights().values():
            self._watch_gradient(weight)

    def _watch_gradient(self, weight: SparseWeight) -> None:
        rows, columns = weight.shape
        weight.values.register_hook(
            lambda gradient: self.returned.add(8 * gradient.untyped_storage().nbytes() / (rows * columns))
        )

    def step(self, number: int) -> float:
        self.engine.begin_step(number)
        batches = []
        for _ in range(self.micro_batches):
            tokens = torch.randint(SHAPE.vocab_size, self.shape, generator=self.generator)
            batches.append((tokens[:, :-1], tokens[:, 1:]))
        result = self.engine.train_step(batches)
        assert result.skipped is None
        for weight in self.sparse_weights().values():
            if weight.resident_transpose:
                # Rebuilt at once, so that it is there to be looked at.
                weight.transpose()
        return result.loss

    def sparse_weights(self) -> dict[str, SparseWeight]:
        return {n: module for n, module in self.engine.module.named_modules() if isinstance(module, SparseWeight)}

    def dense_twins(self) -> list[Tensor]:
        """The skip list's linears of block 0 have the shape of pruned ones in block 1, and are dense by right."""
        parameters = dict(self.engine.module.named_parameters())
        return [parameters[f"layers.1.{letter}.weight.values"] for letter in "qkv"]

    def gradient_buffers(self) -> list[Tensor]:
        """What DeepSpeed keeps from step to step to accumulate and reduce gradients in."""
        optimizer = self.engine._engine.optimizer
        if self.engine.stage == 0:
            return []
        if self.engine.stage == 1:
            return list(optimizer.fp32_groups_gradients_flat)
        return [optimizer.grad_partitions_flat_buffer]

    def buckets(self) -> list[Tensor]:
        """Scratch memory of fixed size, whatever the model: gradients on their way to be reduced."""
        optimizer = self.engine._engine.optimizer
        found = getattr(optimizer, "ipg_buckets", {}).values()
        return [bucket.buffer for bucket in found if bucket.buffer is not None]

    def listed(self) -> Iterator[Tensor]:
        """All memory that may live between steps."""
        for parameter in [*self.engine.module.parameters(), *self.engine.module.buffers()]:
            yield getattr(parameter, "ds_tensor", parameter)
            if parameter.grad is not None:
                yield parameter.grad
        for group in self.engine._state.flat_parameters().values():
            for truth in group:
                yield truth
                yield from self.engine._adam.state[truth].values()
        yield from self.gradient_buffers()
        yield from self.buckets()
        for weight in self.sparse_weights().values():
            yield from weight.cached_tensors()

    def by_right(self) -> set[tuple[int, int]]:
        """Places (address, bytes) of dense parameters of a pruned size, and of their state and gradients."""
        tensors = {id(tensor.tensor): tensor for tensor in logical_tensors(self.engine.module)}
        memory: list[Tensor] = []
        for parameter in self.dense_twins():
            memory.append(parameter)
            for piece in self.engine._state.pieces(tensors[id(parameter)]):
                memory += [piece.truth, piece.exp_avg, piece.exp_avg_sq, piece.model]
            if self.engine.stage == 1:
                group = next(iter(self.gradient_buffers()))
                # The flat gradients are laid out as the flat weights that parameters are views of.
                start = parameter.storage_offset()
                memory.append(group[start : start + parameter.numel()])
        return {(tensor.data_ptr(), tensor.nbytes) for tensor in memory}

    def strangers(self) -> list[str]:
        """Live tensors with the shape or element count of a pruned weight that are not dense by right."""
        places = self.by_right()
        found = [t for t in of_pruned_size(self, live_tensors()) if (t.data_ptr(), t.nbytes) not in places]
        return [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in found]

    def unlisted_storages(self, log: StorageLog) -> list[str]:
        """Live storages as large as the smallest byte mask, or larger, beside the listed ones."""
        listed = {tensor.untyped_storage()._cdata for tensor in self.listed()}
        smallest = min(pruned_sizes(self)[1])
        alive = {key: described for key, described in log.alive().items() if key not in listed}
        sizes = {key: torch.UntypedStorage._new_with_weak_ptr(log.seen[key][0].cdata).nbytes() for key in alive}
        return [described for key, described in alive.items() if sizes[key] >= smallest]

    def kept(self) -> dict[str, list[float]]:
        """Bytes of this rank for each pruned weight, of its elements: weight, masters and moments."""
        tensors = {id(tensor.tensor): tensor for tensor in logical_tensors(self.engine.module)}
        result = {}
        for name, weight in self.sparse_weights().items():
            held = [getattr(tensor, "ds_tensor", tensor) for tensor in (weight.values, weight.indices)]
            held += weight.cached_tensors()
            pieces = list(self.engine._state.pieces(tensors[id(weight.values)]))
            state = [tensor for piece in pieces for tensor in (piece.exp_avg, piece.exp_avg_sq)]
            state += [piece.truth for piece in pieces if piece.truth.data_ptr() != weight.values.data_ptr()]
            sizes = [sum(tensor.nbytes for tensor in group) for group in (held, state)]
            result[name] = [8 * size / (weight.shape[0] * weight.shape[1]) for size in sizes]
        return result


def train_and_look(path: str, leak: bool = False) -> dict[str, Any]:
    """Three steps; what was found after each, and the measures after the last."""
    gc.collect()
    gc.freeze()
    held: list[Tensor] = []
    strangers, storages, losses = [], [], []
    with StorageLog() as log:
        training = Training(path)
        for number in range(1, STEPS + 1):
            losses.append(training.step(number))
            if leak and number == STEPS:
                matrix = next(iter(training.sparse_weights().values())).matrix()
                held += [matrix.expand(), matrix.expand() != 0]
            strangers.append(training.strangers())
            storages.append(training.unlisted_storages(log))
    trained = [tensor for tensor in logical_tensors(training.engine.module) if tensor.trained]
    kept = training.kept()
    return {
        "losses": losses,
        "strangers": strangers,
        "storages": storages,
        "returned": sorted(training.returned),
        "kept": kept,
        # DeepSpeed's flat buffers hold every parameter, one after the other.
        "accumulated": sum(tensor.nbytes for tensor in training.gradient_buffers()),
        "trained": sum(torch.Size(tensor.shape).numel() for tensor in trained),
    }


CASES: list[tuple[int, dict[str, Any], dict[str, float]]] = [
    # weight: what each rank keeps; optimizer: all ranks' masters and moments; returned: the gradient that autograd
    # hands on; accumulated: what each rank keeps to add gradients up in, in fp32, beyond the step.
    (
        1,
        {"parallel__zero_stage": 0, "sparsity__backward_weight": "resident"},
        {"weight": 2 * 17, "optimizer": 32, "returned": 16, "accumulated": 0},
    ),
    (
        2,
        {"parallel__zero_stage": 1, "precision": "bf16"},
        {"weight": 9, "optimizer": 48, "returned": 8, "accumulated": 16},
    ),
    (
        2,
        {"parallel__zero_stage": 3, "precision": "bf16"},
        {"weight": 4.5, "optimizer": 48, "returned": 8, "accumulated": 8},
    ),
]


@pytest.mark.parametrize(("ranks", "changes", "bits"), CASES, ids=["0 resident", "1 bf16", "3 bf16"])
def test_between_steps_nothing_dense_lives_of_a_pruned_weight(
    ranks: int, changes: dict[str, Any], bits: dict[str, float], tmp_path: Path
) -> None:
    path = str(write_config(tmp_path, tmp_path, **SIZES, **changes))
    found = run_ranks(train_and_look, ranks, path)
    for rank in found:
        assert len(set(rank["losses"])) == STEPS
        assert rank["strangers"] == [[]] * STEPS
        assert rank["storages"] == [[]] * STEPS
        assert len(rank["kept"]) == 12 - 3
        assert {weight for weight, _ in rank["kept"].values()} == {bits["weight"]}
        assert rank["returned"] == [bits["returned"]]
        # The buffers hold all that is trained, and of a pruned weight that is every second element; each of the two
        # groups is padded to an even length on every rank.
        accumulated = rank["accumulated"] - 2 * bits["accumulated"] / 8 * rank["trained"]
        assert 0 <= accumulated <= 2 * 2 * ranks * 4
    for name in found[0]["kept"]:
        assert sum(rank["kept"][name][1] for rank in found) == bits["optimizer"], name


def test_a_dense_copy_and_a_byte_mask_would_be_found(tmp_path: Path) -> None:
    path = str(write_config(tmp_path, tmp_path, **SIZES, precision="bf16"))
    [found] = run_ranks(train_and_look, 1, path, True)
    assert found["strangers"][:-1] == [[]] * (STEPS - 1)
    assert sorted(found["strangers"][-1]) == ["(48, 48) torch.bfloat16", "(48, 48) torch.bool"]
    assert len(found["storages"][-1]) == 2
