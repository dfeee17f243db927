"""Where the tensors of a model lie in files of Hugging Face's transformers.

Names are ours for LLaMA and Mistral, and ours with a prefix for OPT. GPT-2's query, key and value are one layer there,
and the weight of a linear layer is [I, O].

Shape letters: O out, I in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from slope_dist.export.stored import Skeleton

_GPT2_PART = re.compile(r"(.*\.attn)\.([qkv])_proj")
_BLOCK = re.compile(r"\.([0-9]+)\.")

OLD_PREFIXES = {"opt": "model.", "gpt2": "transformer."}
"""What the names of some published models lack: those that were saved without their head."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file.

    Attributes:
        name: in the file.
        shape: in the file.
        parts: our tensors that it holds, as of a model whose linear layers are all dense, and their rows: they lie one
            after another along O.
        transposed: whether it is [I, O], and its parts [O, I].
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, int]
    transposed: bool = False


def module_of(family: str, name: str) -> str:
    """transformers' module for our layer `name`."""
    if family == "opt":
        return f"model.{name}"
    part = _GPT2_PART.fullmatch(name) if family == "gpt2" else None
    return f"{part[1]}.c_attn" if part else name


def modules_of(family: str, layers: Iterable[str], apart: Collection[str] = ()) -> dict[str, list[str]]:
    """transformers' modules, each with those of our `layers` that it holds, along O.

    Those that are `apart` are modules of their own, by our names.
    """
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer if layer in apart else module_of(family, layer), []).append(layer)
    return found


def file_tensors(family: str, skeleton: Skeleton) -> list[FileTensor]:
    """All tensors of a model's files: those outside the blocks first, then block by block."""
    found = []
    for name, shape in skeleton.others.items():
        layer, _, kind = name.rpartition(".")
        found.append(FileTensor(f"{module_of(family, layer)}.{kind}", shape, {name: shape[0]}))
    for module, layers in modules_of(family, skeleton.linears).items():
        rows = {layer: skeleton.linears[layer][0][0] for layer in layers}
        (_, columns), bias = skeleton.linears[layers[0]]
        shape, transposed = (sum(rows.values()), columns), family == "gpt2"
        weights = {f"{layer}.weight.values": count for layer, count in rows.items()}
        found.append(FileTensor(f"{module}.weight", shape[::-1] if transposed else shape, weights, transposed))
        if bias:
            biases = {f"{layer}.bias": count for layer, count in rows.items()}
            found.append(FileTensor(f"{module}.bias", shape[:1], biases))
    return sorted(found, key=lambda tensor: _block_of(tensor.name))


def _block_of(name: str) -> int:
    match = _BLOCK.search(name)
    return int(match[1]) if match else -1
