"""A model at rest, in whatever files: what every form can be read as, and every form is written from.

Shape letters: O out, I in, K kept entries a row, R adapter rank, V vocabulary, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from slope_dist.config import Config
from slope_dist.config.model import ModelConfig
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.layers import LayerFactory, Linear, logical_tensors
from slope_dist.models import build_model, family
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import CompressedMatrix, Pattern, pattern_of

PROJECTIONS = frozenset({"decoder.project_in", "decoder.project_out"})
"""Linear layers outside the blocks, which are dense and have no adapter."""

CHUNK_BYTES = 64 * 2**20
"""About as much of a tensor exists at one time, where its rows can be taken one after another."""

_FINITE_BLOCK = 2**20


@dataclass(frozen=True)
class LinearForm:
    """How one linear layer is stored.

    Attributes:
        shape: [O, I] of its weight.
        pattern: N:M of its stored values; None: dense.
        adapter_rank: R of its adapter; 0: none.
        appended: the adapter's first factor is the last R rows of the stored weight (arXiv 2405.16325, Eq. 4.11).
        bias: whether it has one.
    """

    shape: tuple[int, int]
    pattern: Pattern | None = None
    adapter_rank: int = 0
    appended: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Skeleton:
    """The tensors of a model without a byte of them, by global name.

    Attributes:
        linears: the linear layers of the blocks, and those projections beside them that a family has: name -> [O, I]
            and whether it has a bias.
        others: every tensor that belongs to no such layer: name -> shape.
    """

    linears: dict[str, tuple[tuple[int, int], bool]]
    others: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: ModelConfig) -> Skeleton:
        """From the config of a model, whose layers are made on the meta device."""
        made = build_model(model.family, shape_of(model), LayerFactory(seed=0, pattern=None, device="meta"))
        layers = [module for module in made.modules() if isinstance(module, Linear)]
        linears = {layer.name: (layer.weight.shape, layer.bias is not None) for layer in layers}
        parts = {f"{name}.{part}" for name in linears for part in ("weight.values", "bias")}
        others = {tensor.name: tensor.shape for tensor in logical_tensors(made) if tensor.name not in parts}
        return cls(linears, others)


def forms_of(skeleton: Skeleton, config: Config, adapter_rank: int = 0) -> dict[str, LinearForm]:
    """How a run stores each linear layer, by name; `adapter_rank` is that of the sparse ones."""
    sparsity = config.sparsity
    kept_dense = [*family(config.model.family).dense_layers, *sparsity.dense_layers]
    forms = {}
    for name, (shape, bias) in skeleton.linears.items():
        pattern: Pattern | None = None
        is_dense = name in PROJECTIONS or any(fnmatchcase(name, glob) for glob in kept_dense)
        if sparsity.group is not None and not is_dense:
            pattern = pattern_of(name, sparsity.pattern, sparsity.layer_patterns)
        forms[name] = LinearForm(shape, pattern, 0 if pattern is None else adapter_rank, bias=bias)
    return forms


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for those who find it elsewhere.

    Attributes:
        path: of the files.
        form: "checkpoint", "hf", "compressed" or "slope".
        step: optimizer steps taken; None where the files do not say.
    """

    path: Path
    form: str
    step: int | None = None


class StoredModel(ABC):
    """A model at rest. Names and shapes are the logical ones: global, of no layout.

    Of a linear layer "NAME": `NAME.weight.values` ([O, I] dense, [O, K] sparse), `NAME.weight.indices` (uint8
    [O, I / 8], sparse only), `NAME.bias` [O], `NAME.adapter.down` [R, I] and `NAME.adapter.up` [O, R], which add
    X down^T up^T / R.

    Attributes:
        origin: where it comes from.
        model: family and sizes.
        dtype: of all its numbers.
        linears: how each linear layer is stored, by name.
    """

    origin: Origin
    model: ModelConfig
    dtype: torch.dtype
    linears: dict[str, LinearForm]

    @cached_property
    def skeleton(self) -> Skeleton:
        """Names and shapes of the model's tensors."""
        return Skeleton.of(self.model)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor `read` knows, in the order of the model: layers as they are used, metadata behind its values."""
        shapes: dict[str, tuple[int, ...]] = dict(self.skeleton.others)
        for name, form in self.linears.items():
            rows, columns = form.shape
            kept = columns if form.pattern is None else form.pattern.kept(columns)
            shapes[f"{name}.weight.values"] = (rows, kept)
            if form.pattern is not None:
                shapes[f"{name}.weight.indices"] = (rows, columns // 8)
            if form.bias:
                shapes[f"{name}.bias"] = (rows,)
            if form.adapter_rank:
                shapes[f"{name}.adapter.down"] = (form.adapter_rank, columns)
                shapes[f"{name}.adapter.up"] = (rows, form.adapter_rank)
        return shapes

    @property
    def has_adapters(self) -> bool:
        """Whether any layer has one."""
        return any(form.adapter_rank for form in self.linears.values())

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, on the CPU, in `dtype` or uint8; the caller's own memory.

        Raises:
            UserError: if the files do not hold what they should, or it is damaged.
        """

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made its ids.

        Raises:
            UserError: if there is none with it, naming where it was looked for.
        """

    def matrix(self, name: str) -> CompressedMatrix:
        """The sparse weight of a linear layer, its metadata checked.

        Raises:
            UserError: see `read`.
        """
        pattern = self.linears[name].pattern
        assert pattern is not None
        return CompressedMatrix(self.read(f"{name}.weight.values"), self.read(f"{name}.weight.indices"), pattern)

    def dense(self, name: str) -> Tensor:
        """The weight of a linear layer with explicit zeros: [O, I]."""
        if self.linears[name].pattern is None:
            return self.read(f"{name}.weight.values")
        return self.matrix(name).expand()

    def adapter_product(self, name: str) -> Tensor:
        """What the adapter of a linear layer adds to its weight, up down / R: fp32 [O, I]."""
        down, up = (self.read(f"{name}.adapter.{part}").float() for part in ("down", "up"))
        return up @ down / down.shape[0]

    def merged(self, name: str) -> Tensor:
        """The weight of a linear layer with what its adapter, if any, adds: fp32 [O, I]."""
        dense = self.dense(name).float()
        return dense + self.adapter_product(name) if self.linears[name].adapter_rank else dense

    def appended(self, name: str) -> CompressedMatrix:
        """The weight of a linear layer with its adapter's 2:4 first factor as its last R rows: [O + R, I]."""
        weight = self.matrix(name)
        # By magnitude: where a group has fewer than two entries that are not zero, zeros are kept too.
        factor = CompressedMatrix.prune(self.read(f"{name}.adapter.down"), weight.pattern)
        return CompressedMatrix.join([weight, factor], dim=0)


def nothing_sparse(stored: StoredModel) -> list[str]:
    """A line for who expects sparse weights of a model whose files hold none."""
    if any(form.pattern is not None for form in stored.linears.values()):
        return []
    line = f"no linear layer is stored sparse in {stored.origin.path}, so all are written dense"
    if stored.origin.form == "hf":
        line += "; this form does not tell pruned entries from zeros: convert the checkpoint, if it was made of one"
    return [line]


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Cuts of a tensor's rows into blocks of about `CHUNK_BYTES`."""
    rows, row_bytes = (shape[0] if shape else 1), prod(shape[1:]) * itemsize
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, looked at in parts: at once it would take twice its memory more."""
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(_FINITE_BLOCK))


def keeps_two_of_four(dense: Tensor) -> bool:
    """Whether every four consecutive entries of a row hold at most two that are not zero: [O, I]."""
    if dense.shape[1] % 8:
        return False
    return bool(((dense != 0).view(dense.shape[0], -1, 4).sum(dim=2) <= 2).all())
