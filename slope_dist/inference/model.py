"""A stored model in memory: layer by layer, its sparse weights as they are stored, nothing that training needs."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from slope_dist.data.tokenizer import Tokenizer
from slope_dist.export.opening import open_model
from slope_dist.export.stored import LinearForm, StoredModel
from slope_dist.inference.products import attend_at_any_length, start_products
from slope_dist.layers import LayerFactory, Linear, LowRankAdapter, logical_tensors
from slope_dist.layers.linear import Split
from slope_dist.models import Decoding, LanguageModel, build_model, family
from slope_dist.planning.shapes import shape_of
from slope_dist.sparse import CompressedMatrix, DenseWeight, SparseWeight, Weight
from slope_dist.transfer import Transfer


class AppendedLinear(nn.Module):
    """A sparse weight with the adapter's first factor as its last R rows: one product reads the input for both.

    [Y1 | Y2] = X [W^T | down^T]; Y = Y1 + Y2 up^T / R (arXiv 2405.16325, Eq. 4.11).
    """

    def __init__(self, name: str, weight: SparseWeight, up: Tensor, *, bias: bool) -> None:
        super().__init__()
        self.name = name
        self.weight = weight
        self.adapter = nn.ParameterDict({"up": nn.Parameter(up)})
        self.bias = nn.Parameter(torch.zeros(up.shape[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        up = self.adapter["up"]
        rank = up.shape[1]
        both = self.weight(x)
        y, low = both[..., :-rank], both[..., -rank:]
        y = y + functional.linear(low * (1.0 / rank), up)
        return y if self.bias is None else y + self.bias


class InferenceFactory(LayerFactory):
    """Makes each linear layer as it is stored, without memory: `load_layer` gives every tensor its own."""

    def __init__(self, linears: dict[str, LinearForm]) -> None:
        super().__init__(seed=0, pattern=None, draw=False, device="meta")
        self._linears = linears

    def linear(  # type: ignore[override]
        self, name: str, in_features: int, out_features: int, *, split: Split, std: float, bias: bool = True
    ) -> nn.Module:
        """The layer called `name`; where its adapter is appended, an `AppendedLinear`."""
        form = self._linears[name]
        rank = form.adapter_rank
        rows = out_features + (rank if form.appended else 0)
        with torch.device(self.device):
            weight: Weight
            if form.pattern is None:
                weight = DenseWeight(torch.empty(rows, in_features))
            else:
                weight = SparseWeight(CompressedMatrix.blank((rows, in_features), form.pattern, self.device))
            if form.appended:
                assert isinstance(weight, SparseWeight)
                return AppendedLinear(name, weight, torch.empty(out_features, rank), bias=bias)
            adapter = None
            if rank:
                assert split != "whole"
                adapter = LowRankAdapter(torch.empty(rank, in_features), out_features, split=split)
            return Linear(name, weight, bias=bias, split=split, adapter=adapter)


class InferenceModel:
    """A model to ask.

    Attributes:
        stored: where it came from.
        module: its layers.
        device, dtype: of its weights.
        context: most tokens of a sequence.
        dispatcher: what computes its 2:4 products; None: the reference.
    """

    def __init__(
        self,
        stored: StoredModel,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        self.stored = stored
        self.device = torch.device(device)
        self.dtype = dtype or stored.dtype
        self.context = stored.model.sequence_length
        self._tokenizer: Tokenizer | None = None
        attend_at_any_length()
        self.module = _loaded(stored, self.device, self.dtype, transfer or Transfer())
        self.dispatcher = start_products(self.module, self.device, self.dtype)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.stored.model.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made its ids.

        Raises:
            UserError: if there is none with it.
        """
        if self._tokenizer is None:
            self._tokenizer = self.stored.tokenizer()
        return self._tokenizer

    @torch.inference_mode()
    def logits(self, tokens: Tensor, decoding: Decoding | None = None, since: int = 0) -> Tensor:
        """int64 [B, S] -> [B, S - since, V] in the model's dtype.

        With `decoding` the tokens are the next part of its sequences; the first `since` of them get no logits. A
        sequence should not be longer than `context`.
        """
        return self.module.logits(tokens.to(self.device), decoding, since)

    @property
    def weight_bytes(self) -> int:
        """Memory of all parameters and metadata."""
        tensors = {id(t): t for t in [*self.module.parameters(), *self.module.buffers()]}
        return sum(tensor.nbytes for tensor in tensors.values())

    @property
    def linear_bytes(self) -> int:
        """Memory of the blocks' linear layers alone: weights, metadata and adapters, without biases."""
        layers = [module for module in self.module.modules() if isinstance(module, Linear | AppendedLinear)]
        tensors = [t for layer in layers for t in [*layer.parameters(), *layer.buffers()] if t.dim() == 2]
        return sum(tensor.nbytes for tensor in tensors)


def load_model(
    path: Path,
    *,
    tokenizer: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    transfer: Transfer | None = None,
) -> InferenceModel:
    """Load a checkpoint, a run's newest one, or any form that it was converted to.

    Raises:
        UserError: if it is none, damaged, or does not fit together.
    """
    return InferenceModel(open_model(path, tokenizer), device=device, dtype=dtype, transfer=transfer)


def load_layer(layer: nn.Module, stored: StoredModel, dtype: torch.dtype, transfer: Transfer) -> None:
    """Put stored tensors, cast to `dtype`, in the place of those of a layer that `InferenceFactory` made."""
    with torch.no_grad():
        for tensor in logical_tensors(layer):
            name, live = tensor.name, tensor.tensor
            owner, _, part = name.rpartition(".weight.")
            appended = part and owner in stored.linears and stored.linears[owner].appended
            found = getattr(stored.appended(owner), part) if appended else stored.read(name)
            transfer.add(found.nbytes)
            found = found if live.dtype == torch.uint8 else found.to(dtype)
            # Not set as the data of the old one, which has no memory and so is of another kind. What else refers to the
            # tensor, such as a head tied to it, has the new one too.
            torch.utils.swap_tensors(
                live, nn.Parameter(found, requires_grad=False) if isinstance(live, nn.Parameter) else found
            )


def _loaded(stored: StoredModel, device: torch.device, dtype: torch.dtype, transfer: Transfer) -> LanguageModel:
    transfer.begin(sum(_bytes_of(name, shape, stored.dtype) for name, shape in stored.shapes.items()))

    def load(layer: nn.Module) -> None:
        load_layer(layer, stored, dtype, transfer)
        layer.to(device)

    model = build_model(stored.model.family, shape_of(stored.model), InferenceFactory(stored.linears), prepare=load)
    return model.eval()


def _bytes_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * (1 if name.endswith(".weight.indices") else dtype.itemsize)


def loss_in_layers(
    stored: StoredModel, tokens: Tensor, labels: Tensor, dtype: torch.dtype | None = None, ignored: int = -100
) -> float:
    """Mean loss of a batch with one layer in memory at a time: int64 [B, S] twice -> nats."""
    dtype = dtype or stored.dtype
    factory = InferenceFactory(stored.linears)
    hidden = tokens
    with torch.inference_mode():
        for build in family(stored.model.family).layers(factory, shape_of(stored.model)):
            layer = build()
            load_layer(layer, stored, dtype, Transfer())
            hidden = layer(hidden)
        return float(functional.cross_entropy(hidden.float().flatten(0, 1), labels.flatten(), ignore_index=ignored))
