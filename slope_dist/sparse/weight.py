"""Weights as modules: how a matrix is stored, which products it takes part in.

Placement, bias and adapter are the layer's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slope_dist.sparse import codec, kernels, pruning
from slope_dist.sparse.compressed import CompressedMatrix
from slope_dist.sparse.function import KernelForm, TransposeForm, kernel_product, sparse_product
from slope_dist.sparse.kernels import primitives
from slope_dist.sparse.pattern import Pattern

Product = Callable[[Tensor, Tensor], Tensor]
"""X [..., I] and W [O, I] -> X W^T [..., O]."""


def _added(y: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    y = y if addend is None else y + addend
    return y if bias is None else y + bias


class Weight(nn.Module):
    """A matrix [O, I] with `forward(x, bias, addend) = x W^T + addend + bias`.

    `values` is its one trained parameter, whatever the storage.
    """

    values: nn.Parameter
    shape: tuple[int, int]

    def takes_adapters(self) -> bool:
        """Whether `product_with_adapter` may be called now."""
        return False

    def product_with_adapter(self, x: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """X W^T + (scale X down^T) up^T (+ bias), without gradients: down [R, I], up [O, R]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shape for `print(model)`."""
        return f"out={self.shape[0]}, in={self.shape[1]}"


class DenseWeight(Weight):
    """Stored whole: `values` [O, I]."""

    def __init__(self, dense: Tensor) -> None:
        super().__init__()
        self.shape = (dense.shape[0], dense.shape[1])
        self.values = nn.Parameter(dense)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, addend: Tensor | None = None, *, product: Product | None = None
    ) -> Tensor:
        """[..., I], [O], [..., O] -> [..., O].

        By another `product` where each rank has but a part of the weight's gradient.
        """
        if product is not None:
            return _added(product(x, self.values), bias, addend)
        # Looked up now: ZeRO 3 puts a product in its place that lets go of a gathered weight.
        if addend is None and x.is_cuda:
            # In the product's epilogue, where 2:4 products have it.
            return functional.linear(x, self.values, bias)
        return _added(functional.linear(x, self.values), bias, addend)


class SparseWeight(Weight):
    """Stored as N:M values plus packed metadata; the pair is the only truth (rules R1, R2).

    State: `values` [O, K], an ordinary parameter; `indices` uint8 [O, I / 8]; with `hold_column_mask`, `column_mask`
    uint8 [O, I / 8], one bit an element. Metadata is a buffer where the weight is whole on its data rank, and a frozen
    parameter with `metadata_as_parameter`, for engines that shard parameters over data ranks.

    A resident (W^{R,C})^T is a cache: no buffer, no parameter, rebuilt at first use after `values_changed()`. So is the
    metadata of a vendor's library, made at first use after `indices_changed()`.
    """

    indices: Tensor
    column_mask: Tensor | None

    def __init__(
        self,
        matrix: CompressedMatrix,
        *,
        hold_column_mask: bool = False,
        resident_transpose: bool = False,
        metadata_as_parameter: bool = False,
    ) -> None:
        super().__init__()
        if resident_transpose and metadata_as_parameter:
            raise ValueError("a resident transpose would be a full replica of a weight that is sharded over data ranks")
        self.pattern: Pattern = matrix.pattern
        self.shape = matrix.shape
        self.resident_transpose = resident_transpose
        self._transpose: TransposeForm | None = None
        self._transpose_is_new = False
        self._metadata: tuple[str, Tensor | None] | None = None
        self.is_sharded = metadata_as_parameter
        self.values = nn.Parameter(matrix.values)
        held = None
        if hold_column_mask:
            held = matrix.column_mask if matrix.column_mask is not None else torch.zeros_like(matrix.indices)
        for name, tensor in (("indices", matrix.indices), ("column_mask", held)):
            if tensor is not None and metadata_as_parameter:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        if hold_column_mask and matrix.column_mask is None and not matrix.values.is_meta:
            self.refresh_column_mask()

    def forward(self, x: Tensor, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        """[..., I], [O], [..., O] -> [..., O] over W^R; backward over W^{R,C}.

        What is added, a dispatcher's kernels add in the product itself.
        """
        if self.pattern.is_two_four and kernels.active_on(x.device) is not None:
            if bias is not None and self.is_sharded:
                # A library's plan holds the bias's address, and a gathered one never lies where it did.
                return self._kernel_product(x, None, addend) + bias
            return self._kernel_product(x, bias, addend)
        transpose = self.transpose() if self._wants_transpose() else None
        y = sparse_product(
            x, self.values, self.indices, self.pattern, column_mask=self.column_mask, transpose=transpose
        )
        return _added(y, bias, addend)

    def takes_adapters(self) -> bool:
        """Whether a dispatcher is in use, no gradients are wanted, and the weight is whole.

        No parameter is looked at: ZeRO 3 would gather it for the module that asks, and not let go.
        """
        whole = self.pattern.is_two_four and not self.is_sharded
        return whole and kernels.active() is not None and not torch.is_grad_enabled()

    def _kernel_product(self, x: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
        form, metadata = self._kernel_metadata()
        transpose = self._transpose_form() if self._wants_transpose() else None
        return kernel_product(
            x,
            self.values,
            self.indices,
            KernelForm(form, metadata, transpose),
            column_mask=self.column_mask,
            bias=bias,
            addend=addend,
        )

    def product_with_adapter(self, x: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """X (W^R)^T + (scale X down^T) up^T (+ bias): a whole weight, no gradients."""
        if kernels.active_on(x.device) is None:
            return self(x, bias, functional.linear(functional.linear(x, down) * scale, up))
        form, metadata = self._kernel_metadata()
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.slope_dist.product_with_adapter(
            flat, self.values, self.indices, form, metadata, bias, down, up, scale
        )
        return y.view(*x.shape[:-1], self.shape[0])

    def _wants_transpose(self) -> bool:
        return self.resident_transpose and torch.is_grad_enabled()

    @torch.no_grad()
    def _kernel_metadata(self) -> tuple[str, Tensor | None]:
        """A vendor's metadata of W^R; what is sharded over data ranks has none that lasts."""
        if torch.compiler.is_compiling():
            return self._metadata or ("", None)
        dispatcher = kernels.active_on(self.values.device)
        if dispatcher is None or self.is_sharded:
            return "", None
        form = dispatcher.form(self.indices, self.values.dtype)
        if self._metadata is None or self._metadata[0] != form:
            made = dispatcher.metadata(self.indices, self.values.dtype)
            self._metadata = (form, None if made is None else made[1])
        return self._metadata

    @torch.no_grad()
    def prepare_kernels(self) -> None:
        """Make what products read beside values and indices, rather than at the first product; a compiler needs it.

        Where the dispatcher in use arranges weights in place, the values move to where a vendor's library reads them as
        they are; that is not for engines which move parameters themselves, and the next move or cast undoes it.
        """
        dispatcher = kernels.active_on(self.values.device)
        if dispatcher is not None and self.pattern.is_two_four and not self.is_sharded:
            values, self._metadata = dispatcher.lay(self.values, self.indices)
            if values is not self.values:
                self.values.data = values

    def matrix(self) -> CompressedMatrix:
        """The weight as plain data, sharing memory: for cutting, joining, expanding."""
        return CompressedMatrix(self.values.detach(), self.indices, self.pattern, self.column_mask)

    @torch.no_grad()
    def refresh_column_mask(self) -> None:
        """Set the held column mask to the magnitudes of now.

        Called on the schedule of `column_mask_interval`, never by a save.
        """
        assert self.column_mask is not None
        # Not what only an interpreter of Triton would run: thousands of times slower than plain torch.
        if self.pattern.is_two_four and self.values.is_cuda:
            self.column_mask.copy_(primitives.column_mask(self.values, self.indices))
        else:
            kept = pruning.column_mask(self.values, self.indices, self.pattern)
            self.column_mask.copy_(codec.pack_bits(kept))
        self._transpose, self._transpose_is_new = None, False

    def values_changed(self) -> None:
        """Drop what was derived from the values, unless it is of the new ones; called after every optimizer step."""
        if not self._transpose_is_new:
            self._transpose = None
        self._transpose_is_new = False

    @torch.no_grad()
    def adamw_step(self, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: Tensor, **settings: Any) -> None:
        """Update fp32 values by their gradient and write the resident transpose in the same pass.

        Args:
            exp_avg, exp_avg_sq: the moments, fp32 [O, K].
            step: number of this update, from 1 up: scalar.
            settings: lr, betas, eps and weight_decay, as `reference_adamw.adamw_step_reference` takes them.
        """
        assert self.resident_transpose and self.values.grad is not None
        rows, columns = self.shape
        if self._transpose is None:
            values = self.values.new_empty(columns, rows // 2)
            self._transpose = TransposeForm(values, self.indices.new_empty(columns, rows // 8))
        update, live = primitives.adamw_step(self.values), self.values.data
        update(
            live,
            exp_avg,
            exp_avg_sq,
            self.values.grad,
            self.indices,
            live,
            (self._transpose.values, self._transpose.indices),
            step=step,
            column_mask=self.column_mask,
            **settings,
        )
        # A vendor's metadata was of the old mask; for fp32 none has any.
        self._transpose = TransposeForm(self._transpose.values, self._transpose.indices)
        self._transpose_is_new = True

    def indices_changed(self) -> None:
        """Drop all that was derived; called after every load."""
        self._transpose, self._transpose_is_new = None, False
        self._metadata = None

    def cached_tensors(self) -> list[Tensor]:
        """What was derived and is held in memory now."""
        held = [] if self._metadata is None else [self._metadata[1]]
        if self._transpose is not None:
            held += [self._transpose.values, self._transpose.indices, self._transpose.metadata]
        return [tensor for tensor in held if tensor is not None]

    def transpose(self) -> tuple[Tensor, Tensor]:
        """The resident (W^{R,C})^T.

        Values [I, O n / m], indices uint8 [I, O / 8]; rebuilt if the values have changed.
        """
        form = self._transpose_form()
        return form.values, form.indices

    @torch.no_grad()
    def _transpose_form(self) -> TransposeForm:
        if self._transpose is None:
            dispatcher = kernels.active_on(self.values.device)
            if dispatcher is None or not self.pattern.is_two_four:
                kept = None if self.column_mask is None else codec.unpack_bits(self.column_mask)
                made = pruning.doubly_pruned_transpose(self.values, self.indices, self.pattern, kept)
                self._transpose = TransposeForm(*made)
            else:
                weight = self.values, self.indices, self.column_mask
                if torch.compiler.is_compiling():
                    self._transpose = TransposeForm(*torch.ops.slope_dist.transpose(*weight))
                else:
                    values, indices, metadata = dispatcher.lay_transpose(*weight)
                    self._transpose = TransposeForm(values, indices, *(metadata or ("", None)))
        return self._transpose

    def _apply(self, fn: Callable, recurse: bool = True) -> SparseWeight:
        # A move or cast of the module makes the cache the wrong device or dtype.
        self.indices_changed()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shape and pattern for `print(model)`."""
        return f"{super().extra_repr()}, pattern={self.pattern}"
