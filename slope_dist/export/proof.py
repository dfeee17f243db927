"""Whether a converted model is the one it was made from: read back from its files and compared, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from slope_dist.config.model import ModelConfig
from slope_dist.export.huggingface_names import modules_of
from slope_dist.export.options import Options
from slope_dist.export.stored import StoredModel, row_blocks
from slope_dist.models import ModelShape, Rotary
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import CompressedMatrix, Pattern
from slope_dist.transfer import Transfer


class WrongExportError(Exception):
    """What was written is not what was read: a defect of this program, or of the disk."""


def check_same(source: StoredModel, made: StoredModel, options: Options, transfer: Transfer) -> None:
    """Compare every number of two models, as `options` let the second differ from the first.

    Weights are equal bit for bit, after a cast to the new dtype; an adapter that was split, joined or padded adds the
    same to within rounding.

    Raises:
        WrongExportError: naming the first tensor that is another.
        UserError: if either cannot be read.
    """
    if _computes(source.model) != _computes(made.model):
        raise WrongExportError(f"{made.origin.path}: the model's sizes do not read back")
    transfer.begin(sum(prod(form.shape) for form in source.linears.values()) * made.dtype.itemsize)
    for name, shape in source.skeleton.others.items():
        for start, stop in row_blocks(shape, source.dtype.itemsize):
            _require_equal(name, source.read(name, start, stop).to(made.dtype), made.read(name, start, stop))
    for name, form in source.linears.items():
        dense = source.merged(name) if options.merge_adapters else source.dense(name)
        found = made.dense(name)
        _require_equal(f"{name}.weight", dense.to(made.dtype), found)
        transfer.add(found.nbytes)
        if form.bias:
            _require_equal(f"{name}.bias", source.read(f"{name}.bias").to(made.dtype), made.read(f"{name}.bias"))
        if form.adapter_rank and not options.merge_adapters:
            _check_adapter(source, made, name, options)


def _computes(model: ModelConfig) -> tuple[str, ModelShape]:
    """What of a model shows in its logits, what its config leaves open filled in; not how its weights were begun."""
    shape = shape_of(model)
    # The other numbers of rotary positions are those of a scaling.
    rotary = shape.rotary if shape.rotary.scaling is not None else Rotary(base=shape.rotary.base)
    shape = replace(shape, num_kv_heads=shape.kv_heads, rotary=rotary)
    return model.family, replace(shape, init_std=0.0, scale_residual_init=False)


def _check_adapter(source: StoredModel, made: StoredModel, name: str, options: Options) -> None:
    before, after = source.linears[name], made.linears[name]
    if not after.adapter_rank:
        raise WrongExportError(f"{name}.adapter: it is not there")
    pattern = Pattern(2, 4) if options.prune_adapters and after.appended else None
    expected, found = _expected_product(source, name, pattern), made.adapter_product(name)
    bound = 4 * torch.finfo(made.dtype).eps * float(expected.norm())
    changed = options.prune_adapters or options.pad_adapters or _is_scaled(source, made, name)
    if before.adapter_rank == after.adapter_rank and not changed:
        for part in ("down", "up"):
            tensor = f"{name}.adapter.{part}"
            factors = source.read(tensor).to(made.dtype), made.read(tensor)
            if after.appended:
                # Zeros that are not kept have no sign.
                factors = factors[0] + 0.0, factors[1] + 0.0
            _require_equal(tensor, *factors)
    elif not float((expected - found).norm()) <= bound:
        raise WrongExportError(f"{name}.adapter: it adds something else than it did")


def _is_scaled(source: StoredModel, made: StoredModel, name: str) -> bool:
    """Whether the layer may share a module of PEFT's, which has one lora_alpha / r, with adapters of other ranks."""
    modules = modules_of(source.model.family, source.linears).values()
    layers = next(layers for layers in modules if name in layers)
    ranks = {source.linears[layer].adapter_rank for layer in layers} - {0}
    return made.origin.form != "slope" and len(ranks) > 1


def _expected_product(model: StoredModel, name: str, pattern: Pattern | None) -> Tensor:
    """What the adapter should add to its weight, its first factor pruned or not: fp32 [O, I]."""
    if pattern is None:
        return model.adapter_product(name)
    down, up = (model.read(f"{name}.adapter.{part}") for part in ("down", "up"))
    return up.float() @ CompressedMatrix.prune(down, pattern).expand().float() / down.shape[0]


def _require_equal(name: str, expected: Tensor, found: Tensor) -> None:
    # By their bits: -0.0 is another number than 0.0, and stays it.
    same = expected.shape == found.shape and expected.dtype == found.dtype
    if not same or not torch.equal(_bits(expected), _bits(found)):
        raise WrongExportError(f"{name}: what was written reads back as something else")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
