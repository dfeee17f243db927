"""Blocks and models of random weights, made where they are used: their speed and memory are those of trained ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slope_dist.benchmark.block_linears import SECOND_BLOCK, TWO_FOUR
from slope_dist.config import Config
from slope_dist.layers import LayerFactory, LowRankAdapter
from slope_dist.models import LanguageModel, build_model, family
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import CompressedMatrix, SparseWeight

STD = 0.02


@dataclass(frozen=True)
class Form:
    """How the linears of the blocks are stored.

    Attributes:
        name: for tables.
        sparse: 2:4, else dense.
        resident: the transpose is kept between steps.
        adapter_rank: R; 0: no adapters.
    """

    name: str
    sparse: bool
    resident: bool = False
    adapter_rank: int = 0


def factory(config: Config, form: Form, device: torch.device | str, *, hold_column_mask: bool = False) -> LayerFactory:
    """Makes layers of a form on a device, their values zero until `fill`; the family's first linears stay dense."""
    return LayerFactory(
        seed=0,
        pattern=TWO_FOUR if form.sparse else None,
        dense_layers=family(config.model.family).dense_layers,
        hold_column_mask=hold_column_mask,
        resident_transpose=form.resident,
        adapter_rank=form.adapter_rank,
        draw=False,
        device=str(device),
    )


def build_block(
    config: Config, form: Form, device: torch.device, dtype: torch.dtype, *, hold_column_mask: bool = False
) -> nn.Module:
    """One block of a config's model, filled: not its first, whose first linears are dense."""
    make = factory(config, form, device, hold_column_mask=hold_column_mask)
    block = family(config.model.family).block(make, shape_of(config.model), SECOND_BLOCK)
    fill(block, device, dtype)
    return block


def build_meta_layers(config: Config, form: Form, *, whole: bool) -> list[nn.Module]:
    """All layers of a config's model, or only its second block, without memory: shapes to reckon with."""
    made = family(config.model.family).layers(factory(config, form, "meta"), shape_of(config.model))
    return [make() for make in (made if whole else made[1 + SECOND_BLOCK : 2 + SECOND_BLOCK])]


def build_language_model(config: Config, form: Form, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A config's model, filled, layer by layer."""

    def prepare(layer: nn.Module) -> None:
        fill(layer, device, dtype)

    recompute = config.training.recompute == "blocks"
    return build_model(
        config.model.family,
        shape_of(config.model),
        factory(config, form, device),
        recompute=recompute,
        prepare=prepare,
    )


@torch.no_grad()
def fill(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a layer, give its matrices random normals and its sparse weights random masks; vectors stay as made."""
    layer.to(device, dtype)
    for module in layer.modules():
        if isinstance(module, SparseWeight):
            _prune_anew(module)
    for parameter in layer.parameters():
        if parameter.dim() == 2 and parameter.is_floating_point():
            parameter.normal_(std=STD)
    for module in layer.modules():
        if isinstance(module, LowRankAdapter):
            # A first factor begins as one of unit entries.
            module.down.normal_()
        if isinstance(module, SparseWeight):
            module.values_changed()
            if module.column_mask is not None:
                module.refresh_column_mask()


def _prune_anew(weight: SparseWeight) -> None:
    """A random mask, made a block of rows at a time: whole it would take many times the weight's memory."""
    rows, columns = weight.shape
    step = max(8, 2**24 // columns)
    for start in range(0, rows, step):
        part = weight.indices[start : start + step]
        drawn = torch.rand(part.shape[0], columns, device=part.device)
        part.copy_(CompressedMatrix.prune(drawn, weight.pattern).indices)


def sparse_weights(module: nn.Module) -> list[SparseWeight]:
    """Its 2:4 weights."""
    return [part for part in module.modules() if isinstance(part, SparseWeight)]


def tensor_bytes(module: nn.Module) -> int:
    """Memory of its parameters and buffers, and of what its 2:4 weights hold beside them now, such as transposes."""
    tensors: dict[int, Tensor] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    cached = [tensor for weight in sparse_weights(module) for tensor in weight.cached_tensors()]
    return sum(tensor.nbytes for tensor in (*tensors.values(), *cached))


def with_layers(config: Config, layers: int) -> Config:
    """The config of a model of fewer blocks."""
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})
