"""Rules R1 and R2: between training steps no dense form of a pruned weight lives, nor a mask of a byte an element.

A small OPT trains three steps in bf16 with fp32 masters. After each step everything live is looked at twice: the
tensors in the garbage collector's list, and the storages made since the beginning, whoever holds them. All sizes are
chosen so that a pruned weight's shape and element count are its own. The same run measures bits an element.

Run: pytest tests/models/test_memory.py
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slope_dist.layers import LayerFactory, logical_tensors
from slope_dist.models import LanguageModel, ModelShape, build_model, family
from slope_dist.sparse import Pattern, SparseWeight, Weight
from tests.sparse.oracle import gradient

SHAPE = ModelShape(
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    ffn_size=112,
    vocab_size=72,
    sequence_length=20,
    embedding_size=48,
)
BATCH = 3

OPTIONS: dict[str, dict[str, bool]] = {
    "derived": {},
    "held mask": {"hold_column_mask": True},
    "resident": {"resident_transpose": True},
    "sharded metadata": {"shard_metadata": True},
    "recompute": {"recompute": True},
}


@pytest.fixture(autouse=True)
def nothing_left_by_others() -> Iterator[None]:
    """The collector's list begins empty: what earlier tests, or the compiler, have left behind is not ours."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class StorageLog(TorchDispatchMode):
    """Remembers, without holding them, all storages made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What shares its input's memory is in the log already, or was there before it.
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old:
                reference = StorageWeakRef(tensor.untyped_storage())
                described = f"{tuple(tensor.shape)} {tensor.dtype} of {func}"
                self.seen.setdefault(reference.cdata, (reference, described))
        return result

    def alive(self) -> dict[int, str]:
        gc.collect()
        return {key: described for key, (reference, described) in self.seen.items() if not reference.expired()}


class Training:
    """bf16 model, fp32 masters, AdamW: what a mixed-precision engine does on one rank, written out."""

    def __init__(self, pattern: Pattern | None, *, recompute: bool = False, **options: Any) -> None:
        make = LayerFactory(seed=1, pattern=pattern, dense_layers=family("opt").dense_layers, **options)
        self.model: LanguageModel = build_model("opt", SHAPE, make, recompute=recompute).bfloat16()
        self.trained = [tensor.tensor for tensor in logical_tensors(self.model) if tensor.trained]
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.trained]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3)
        self.generator = torch.Generator().manual_seed(1)

    def step(self) -> float:
        tokens = torch.randint(SHAPE.vocab_size, (BATCH, SHAPE.sequence_length + 1), generator=self.generator)
        loss = self.model(tokens[:, :-1], tokens[:, 1:])
        self.model.zero_grad()
        loss.backward()
        for master, parameter in zip(self.masters, self.trained, strict=True):
            master.grad = gradient(parameter).float()
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.trained, strict=True):
                parameter.copy_(master)
                master.grad = None
        for weight in self.sparse_weights().values():
            weight.values_changed()
            if weight.resident_transpose:
                # Rebuilt at once, so that it is there to be looked at.
                weight.transpose()
        return loss.item()

    def sparse_weights(self) -> dict[str, SparseWeight]:
        return {n: module for n, module in self.model.named_modules() if isinstance(module, SparseWeight)}

    def state_of(self, parameter: Tensor) -> list[Tensor]:
        """The fp32 master and the moments of a parameter."""
        master = next(m for m, p in zip(self.masters, self.trained, strict=True) if p is parameter)
        return [master, *(tensor for tensor in self.optimizer.state[master].values() if tensor.dim())]

    def listed(self) -> Iterator[Tensor]:
        """Everything that may live between steps: parameters, metadata, gradients, masters, moments, steps, caches."""
        for tensor in [*self.model.parameters(), *self.model.buffers(), *self.masters]:
            yield tensor
            if tensor.grad is not None:
                yield tensor.grad
        for state in self.optimizer.state.values():
            yield from state.values()
        for weight in self.sparse_weights().values():
            yield from weight.cached_tensors()


def pruned_sizes(training: Training) -> tuple[set[tuple[int, ...]], set[int]]:
    shapes = {weight.shape for weight in training.sparse_weights().values()}
    return shapes | {(columns, rows) for rows, columns in shapes}, {rows * columns for rows, columns in shapes}


def of_pruned_size(training: Training, tensors: Iterable[Tensor]) -> list[Tensor]:
    shapes, counts = pruned_sizes(training)
    return [tensor for tensor in tensors if tuple(tensor.shape) in shapes or tensor.numel() in counts]


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


def unlisted(training: Training) -> list[Tensor]:
    listed = {id(tensor) for tensor in training.listed()}
    return [tensor for tensor in live_tensors() if id(tensor) not in listed]


def unlisted_storages(training: Training, log: StorageLog) -> list[str]:
    listed = {tensor.untyped_storage()._cdata for tensor in training.listed()}
    return [described for key, described in log.alive().items() if key not in listed]


def dense_parameters_of_pruned_size(training: Training) -> list[Tensor]:
    """The skip list's linears of block 0 have the shape of pruned ones in block 1, and are dense by right."""
    parameters = dict(training.model.named_parameters())
    return [parameters[f"layers.1.{letter}.weight.values"] for letter in "qkv"]


@pytest.mark.parametrize("name", OPTIONS)
def test_between_steps_nothing_dense_lives_of_a_pruned_weight(name: str) -> None:
    with StorageLog() as log:
        training = Training(Pattern(2, 4), **OPTIONS[name])
        losses = []
        for _ in range(3):
            losses.append(training.step())
            assert len(training.sparse_weights()) == 12 - 3
            assert not of_pruned_size(training, unlisted(training))
            by_right = dense_parameters_of_pruned_size(training)
            allowed = {id(t) for p in by_right for t in (p, gradient(p), *training.state_of(p))}
            assert {id(t) for t in of_pruned_size(training, training.listed())} == allowed
            assert unlisted_storages(training, log) == []
        assert len(set(losses)) == 3


def test_a_dense_copy_or_a_byte_mask_would_be_found() -> None:
    with StorageLog() as log:
        training = Training(Pattern(2, 4))
        training.step()
        weight = next(iter(training.sparse_weights().values()))
        dense = weight.matrix().expand()
        mask = dense != 0
        flat = torch.zeros(dense.numel(), dtype=torch.int8)
        assert {id(tensor) for tensor in of_pruned_size(training, unlisted(training))} == {
            id(dense),
            id(mask),
            id(flat),
        }
        assert len(unlisted_storages(training, log)) == 3
        del mask, flat
        # Held by an autograd graph, as a weight would be that a forgotten loss keeps alive.
        product = (torch.ones((), dtype=dense.dtype, requires_grad=True) * dense).sum()
        shape = str(weight.shape)
        del dense
        assert any(shape in described for described in unlisted_storages(training, log))
        del product
        assert not any(shape in described for described in unlisted_storages(training, log))


def test_metadata_is_one_bit_an_element_and_the_only_byte_tensor() -> None:
    training = Training(Pattern(2, 4), hold_column_mask=True)
    training.step()
    metadata = {id(t) for w in training.sparse_weights().values() for t in (w.indices, w.column_mask)}
    small = (torch.bool, torch.uint8, torch.int8)
    listed = [tensor for tensor in training.listed() if tensor.dtype in small]
    assert {id(tensor) for tensor in listed} == metadata
    elements = sum(rows * columns for rows, columns in (w.shape for w in training.sparse_weights().values()))
    assert sum(tensor.untyped_storage().nbytes() for tensor in listed) == 2 * elements // 8


def bits_an_element(weight: Weight, tensors: Iterable[Tensor]) -> float:
    return 8 * sum(tensor.untyped_storage().nbytes() for tensor in tensors) / (weight.shape[0] * weight.shape[1])


@pytest.mark.parametrize(
    ("pattern", "options", "expected"),
    [
        (Pattern(2, 4), {}, {"weight": 9, "gradient": 8, "optimizer": 48}),
        (Pattern(2, 4), {"resident_transpose": True}, {"weight": 9 + 9, "gradient": 8, "optimizer": 48}),
        (None, {}, {"weight": 16, "gradient": 16, "optimizer": 96}),
    ],
    ids=["2:4", "2:4 with resident transpose", "dense twin"],
)
def test_measured_bits_an_element(pattern: Pattern | None, options: dict, expected: dict[str, float]) -> None:
    training = Training(pattern, **options)
    training.step()
    names = list(Training(Pattern(2, 4)).sparse_weights())
    weights = dict(training.model.named_modules())
    for name in names:
        weight = weights[name]
        cache = (weight.cached_tensors()) if isinstance(weight, SparseWeight) else ()
        measured = {
            "weight": bits_an_element(weight, [*weight.parameters(), *weight.buffers(), *cache]),
            "gradient": bits_an_element(weight, [gradient(weight.values)]),
            "optimizer": bits_an_element(weight, training.state_of(weight.values)),
        }
        assert measured == expected, name
