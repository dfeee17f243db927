"""The layers models are made of, and the factory that decides how each one is stored and placed.

Shape letters: B batch, S sequence, T = B * S tokens, O out, I in, R adapter rank, V vocabulary.
"""

from slope_dist.layers.factory import LayerFactory
from slope_dist.layers.linear import Linear, LowRankAdapter
from slope_dist.layers.logical import LogicalTensor, logical_tensors
from slope_dist.layers.modules import Embedding, Head, LayerNorm, NextTokenLoss

__all__ = [
    "Embedding",
    "Head",
    "LayerFactory",
    "LayerNorm",
    "Linear",
    "LogicalTensor",
    "LowRankAdapter",
    "NextTokenLoss",
    "logical_tensors",
]
