"""Which tensors of a checkpoint make up a layer, and whether they fit together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slope_dist.checkpoint.format import Manifest, StoredTensor
from slope_dist.errors import UserError
from slope_dist.sparse import Pattern, codec, pattern_of

_MOST_PATTERNS = 1 + 200
"""As many as a config may have: each is matched with each layer's name."""

OPTIMIZER_KINDS = ("master", "exp_avg", "exp_avg_sq")

_PARTS = ("weight.values", "weight.indices", "weight.column_mask", "adapter.down", "adapter.up", "weight", "bias")
"""What a layer calls its tensors; of two that fit a name, the longer stands first."""


@dataclass(frozen=True)
class StoredLayer:
    """The tensors of one layer.

    Attributes:
        name: its global name.
        weight: key of its weight, or of what stands for one (a bias alone); None if there is only other state.
        indices: key of its metadata where it is pruned.
        column_mask: key of the column mask, where that is state.
        pattern: what the metadata must follow; None where nothing is pruned or `problem` is set.
        shape: of the weight with its pruned entries.
        adapter_rank: of its adapter, None without one.
        problem: what of it does not fit together, as "key: expected ..., found ...".
    """

    name: str
    weight: str | None
    indices: str | None
    column_mask: str | None
    pattern: Pattern | None
    shape: tuple[int, ...]
    adapter_rank: int | None
    problem: str | None


def stored_layers(manifest: Manifest) -> list[StoredLayer]:
    """The layers of a checkpoint in order of their names, numbers by size."""
    names: dict[str, None] = {}
    for key in manifest.tensors:
        names[_layer_of(key.partition("/")[2])] = None
    ordered = sorted(names, key=lambda name: re.sub("[0-9]+", lambda digits: digits[0].zfill(12), name))
    sparsity = manifest.config.get("sparsity")
    sparsity = sparsity if isinstance(sparsity, dict) else {}
    return [_stored_layer(name, manifest.tensors, sparsity) for name in ordered]


def _layer_of(name: str) -> str:
    part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
    return name if part is None else name.removesuffix(f".{part}")


def _stored_layer(name: str, tensors: Mapping[str, StoredTensor], sparsity: dict[str, Any]) -> StoredLayer:
    def find(kind: str, *parts: str) -> str | None:
        keys = (f"{kind}/{name}.{part}" if part else f"{kind}/{name}" for part in parts)
        return next((key for key in keys if key in tensors), None)

    weight = find("weight", "weight.values", "weight", "", *_PARTS)
    indices, column_mask = find("metadata", "weight.indices"), find("metadata", "weight.column_mask")
    down = find("weight", "adapter.down")
    adapter_rank = tensors[down].shape[0] if down and tensors[down].shape else None
    shape = tensors[weight].shape if weight else ()
    pattern = problem = None
    if weight is None:
        problem = f"{name}: expected a weight, found other state alone"
    elif indices is not None:
        width = tensors[indices].shape[-1:]
        configured, exceptions = sparsity.get("pattern"), sparsity.get("layer_patterns", [])
        try:
            texts = [configured, *(exceptions if isinstance(exceptions, list) else [None])]
            if len(texts) > _MOST_PATTERNS or not all(isinstance(text, str) and len(text) <= 1000 for text in texts):
                raise UserError("no list of a config's")
            pattern = pattern_of(name, texts[0], texts[1:])
        except UserError:
            problem = f"{indices}: expected a pattern as sparsity.pattern of the config, found {configured!r:.40}"
        else:
            shape = (*shape[:-1], *(8 * size for size in width))
            problem = _wrong_metadata(tensors, weight, indices, column_mask, pattern)
    elif column_mask is not None:
        problem = f"{column_mask}: expected metadata beside the column mask, found none"
    if problem is None:
        problem = _wrong_moments(tensors, name)
    known = pattern if problem is None else None
    return StoredLayer(name, weight, indices, column_mask, known, shape, adapter_rank, problem)


def _wrong_metadata(
    tensors: Mapping[str, StoredTensor], weight: str, indices: str, column_mask: str | None, pattern: Pattern
) -> str | None:
    """What does not fit between kept entries [O, K], metadata [O, I / 8] and column mask [O, I / 8]."""
    for key in (indices, column_mask):
        if key is not None and tensors[key].dtype != "U8":
            return f"{key}: expected U8, found {tensors[key].dtype}"
    values, packed = tensors[weight].shape, tensors[indices].shape
    fits = len(packed) == 2 and (packed[0], pattern.kept(packed[1] * 8)) == values
    if not fits or not weight.endswith(".weight.values"):
        return f"{indices}: expected {pattern} metadata of {weight} {list(values)}, found {list(packed)}"
    if column_mask is not None and tensors[column_mask].shape != packed:
        return f"{column_mask}: expected the shape {list(packed)}, found {list(tensors[column_mask].shape)}"
    return None


def _wrong_moments(tensors: Mapping[str, StoredTensor], layer: str) -> str | None:
    """The first of a layer's optimizer states that has not the shape of what it belongs to."""
    for part in ("", *_PARTS):
        name = f"{layer}.{part}" if part else layer
        for kind in OPTIMIZER_KINDS:
            state, weight = tensors.get(f"{kind}/{name}"), tensors.get(f"weight/{name}")
            if state is not None and (weight is None or state.shape != weight.shape):
                expected = f"the shape {list(weight.shape)} of its weight" if weight else "a weight it belongs to"
                return f"{kind}/{name}: expected {expected}, found {list(state.shape)}"
    return None


@cache
def byte_tables(pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Of every byte of metadata: whether it is valid (bool [256]), and the bit mask of what it keeps (uint8 [256])."""
    every_byte = torch.arange(256, dtype=torch.uint8).view(256, 1)
    valid = torch.tensor([_is_valid(byte.view(1, 1), pattern) for byte in every_byte])
    return valid, codec.pack_bits(codec.mask_of(every_byte, pattern)).view(256)


def _is_valid(byte: Tensor, pattern: Pattern) -> bool:
    try:
        codec.check(byte, pattern)
    except ValueError:
        return False
    return True
