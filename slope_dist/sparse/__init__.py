"""The N:M sparse weight: its storage, its pruning, its products and its sharding. Imports no other room.

Shape letters used in every file of this room: T tokens, O out, I in, K = I * n / m kept entries a row (I / 2 for 2:4),
G = I / m groups a row.
"""

from slope_dist.sparse.compressed import CompressedMatrix
from slope_dist.sparse.pattern import Pattern, exception_of, pattern_of
from slope_dist.sparse.weight import DenseWeight, SparseWeight, Weight

__all__ = ["CompressedMatrix", "DenseWeight", "Pattern", "SparseWeight", "Weight", "exception_of", "pattern_of"]
