"""The weights of a stored model with explicit zeros, some rows at a time, and adapters added in.

Shape letters: O out, I in, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slope_dist.export.huggingface_names import FileTensor
from slope_dist.export.stored import StoredModel, row_blocks
from slope_dist.export.tensor_files import cast
from slope_dist.sparse import CompressedMatrix


def rows_of(stored: StoredModel, tensor: FileTensor, dtype: torch.dtype, *, merged: bool) -> Iterator[Tensor]:
    """Blocks of a file's tensor along its first dimension, as `dtype`.

    Args:
        stored: the model.
        tensor: which; of one that is transposed, its whole layer is in memory.
        dtype: to cast to.
        merged: add adapters, computed in fp32, with the whole layer in memory.

    Raises:
        UserError: see `StoredModel.read`; or if a number is beyond the range of `dtype`.
    """
    blocks = (
        cast(block, dtype, tensor.name) for part in tensor.parts for block in _blocks(stored, part, merged=merged)
    )
    if not tensor.transposed:
        yield from blocks
        return
    layer = torch.cat(list(blocks)).T
    for start, stop in row_blocks(tensor.shape, dtype.itemsize):
        yield layer[start:stop].contiguous()


def _blocks(stored: StoredModel, name: str, *, merged: bool) -> Iterator[Tensor]:
    """Blocks of rows of one of our tensors, a linear layer's weight dense."""
    layer = name.removesuffix(".weight.values")
    if layer == name:
        for start, stop in row_blocks(stored.shapes[name], stored.dtype.itemsize):
            yield stored.read(name, start, stop)
        return
    form = stored.linears[layer]
    if merged and form.adapter_rank:
        # Whole: who proves the sum computes it so, and blocks of a product may be rounded otherwise.
        yield stored.merged(layer)
        return
    for start, stop in row_blocks(form.shape, stored.dtype.itemsize):
        block = stored.read(name, start, stop)
        if form.pattern is not None:
            block = CompressedMatrix(block, stored.read(f"{layer}.weight.indices", start, stop), form.pattern).expand()
        yield block
