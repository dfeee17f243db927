"""The families by name, and the one way from a family to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slope_dist.errors import UserError
from slope_dist.layers import LayerFactory, NextTokenLoss
from slope_dist.models import gpt2, llama, opt
from slope_dist.models.decoding import Decoding
from slope_dist.models.shape import ModelShape


@dataclass(frozen=True)
class Family:
    """What the rest of the system needs to know of a model family.

    Attributes:
        embedding: makes the first layer, int64 [B, S] -> [B, S, H].
        block: makes the block of an index, [B, S, H] -> [B, S, H].
        head: makes the last layer, [B, S, H] -> [B, S, V].
        first_linears: global names of the first linears after the input, which SLoPe leaves dense.
    """

    embedding: Callable[[LayerFactory, ModelShape], nn.Module]
    block: Callable[[LayerFactory, ModelShape, int], nn.Module]
    head: Callable[[LayerFactory, ModelShape], nn.Module]
    first_linears: tuple[str, ...]

    @property
    def dense_layers(self) -> dict[str, str]:
        """Global names of the linears that stay dense, with the reason."""
        return dict.fromkeys(self.first_linears, "first after the input")

    def layers(self, make: LayerFactory, shape: ModelShape) -> list[Callable[[], nn.Module]]:
        """What makes each layer, embedding first, head last, so that a rank can make those it holds.

        Each layer takes the output of the one before.
        """
        return [
            partial(self.embedding, make, shape),
            *(partial(self.block, make, shape, index) for index in range(shape.num_layers)),
            partial(self.head, make, shape),
        ]


_LLAMA = Family(llama.LlamaEmbedding, llama.LlamaBlock, llama.LlamaHead, llama.FIRST_LINEARS)
_FAMILIES = {
    "opt": Family(opt.OPTEmbedding, opt.OPTBlock, opt.OPTHead, opt.FIRST_LINEARS),
    "gpt2": Family(gpt2.GPT2Embedding, gpt2.GPT2Block, gpt2.GPT2Head, gpt2.FIRST_LINEARS),
    "llama": _LLAMA,
    "mistral": _LLAMA,
}


def family(name: str) -> Family:
    """The family called `name`; `UserError` if there is none."""
    if name not in _FAMILIES:
        raise UserError(f'there is no model.family "{name}"; there are {", ".join(_FAMILIES)}')
    return _FAMILIES[name]


class LanguageModel(nn.Module):
    """The layers one after another, and the mean next-token loss.

    `recompute` runs each block again in backward instead of keeping its activations.
    """

    def __init__(self, layers: Iterable[nn.Module], loss: NextTokenLoss, *, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.loss = loss
        self.recompute = recompute

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers between the embedding and the head."""
        return list(self.layers)[1:-1]

    def logits(self, tokens: Tensor, decoding: Decoding | None = None, since: int = 0) -> Tensor:
        """int64 [B, S] -> [B, S - since, V], or this tensor rank's part of V.

        With `decoding` the tokens are the next part of its sequences; the first `since` of them get no logits.
        """
        first, *blocks, last = self.layers
        if decoding is not None:
            hidden = first(tokens, decoding.positions(tokens.shape[1]))
            for block, part in zip(blocks, decoding.part(tokens.shape[1], len(blocks)), strict=True):
                hidden = block(hidden, part)
            return last(hidden[:, since:] if since else hidden)
        hidden = first(tokens)
        for block in blocks:
            if self.recompute and self.training:
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return last(hidden[:, since:] if since else hidden)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all B * S labels, computed in fp32: int64 [B, S] twice -> scalar."""
        return self.loss(self.logits(tokens), labels)


def build_model(
    name: str,
    shape: ModelShape,
    make: LayerFactory,
    *,
    recompute: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
) -> LanguageModel:
    """A model of the family `name`, its layers made by `make`, one after another.

    `prepare` is given each layer before the next is made: an engine that shards parameters never sees two whole.
    """

    def made() -> Iterator[nn.Module]:
        for builder in family(name).layers(make, shape):
            layer = builder()
            if prepare is not None:
                prepare(layer)
            yield layer

    return LanguageModel(made(), make.next_token_loss(), recompute=recompute)
