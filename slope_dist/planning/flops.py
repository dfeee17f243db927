"""The arithmetic of training a model on one token, and how much of a card's peak it makes up.

The basis of MFU here is "dense-equivalent": the operations that the dense model of the same shape needs, for a dense
and a 2:4 run alike, so that equal numbers mean equal tokens a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from slope_dist.layers.linear import Linear, LowRankAdapter
from slope_dist.layers.modules import Head
from slope_dist.models import ModelShape

BASIS = "dense-equivalent"

_TRAINING = 3
"""Forward, and twice as much backward: each product has two gradients."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Floating-point operations of forward and backward on one token; a multiplication and an addition are two.

    As in PaLM (arXiv 2204.02311, appendix B): matrix products alone, each once. Looking up embeddings, norms, biases,
    activations, softmax and rotary positions are not counted, nor is what is computed again in backward. Attention is
    counted over the whole sequence: the half that causality hides is not taken off.

    Attributes:
        matrices: 6 an element of every linear, pruned elements included, and of the head.
        attention: scores and mixed values, 12 L N D S for L layers, N heads of D features and S tokens a sequence.
        adapters: 6 an element of the low-rank adapters, which a dense model has not.
    """

    matrices: int
    attention: int
    adapters: int

    @property
    def dense_equivalent(self) -> int:
        """What the dense model of the same shape needs: the basis of MFU."""
        return self.matrices + self.attention


def count_flops(model: nn.Module, shape: ModelShape, sequence_length: int | None = None) -> TrainingFlops:
    """Count a whole model, which may be on the meta device, trained on sequences of this length, else the shape's.

    The model is one without a share: tensor ranks pad the vocabulary.
    """
    matrices = adapters = 0
    for module in model.modules():
        if isinstance(module, Linear):
            matrices += module.weight.shape[0] * module.weight.shape[1]
        elif isinstance(module, Head):
            matrices += module.weight.numel()
        elif isinstance(module, LowRankAdapter):
            adapters += module.down.numel() + module.up.numel()
    features = shape.num_heads * shape.head_size
    scores = shape.num_layers * features * (sequence_length or shape.sequence_length)
    return TrainingFlops(
        matrices=_TRAINING * 2 * matrices,
        # Two products of a query's features with as many keys and values as there are tokens.
        attention=_TRAINING * 4 * scores,
        adapters=_TRAINING * 2 * adapters,
    )


def model_flops_utilization(flops_per_token: float, tokens_per_second: float, peak: float, cards: int = 1) -> float:
    """MFU as a share of 1: the arithmetic of all tokens against what `cards` of `peak` operations a second could do."""
    return flops_per_token * tokens_per_second / (peak * cards)
