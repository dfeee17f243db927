"""Models for use: loaded from any form with sparse weights compressed in memory, evaluated, and asked for text.

Shape letters: B batch, S sequence, L all tokens so far, O out, I in, R adapter rank, V vocabulary.
"""

from slope_dist.inference.model import InferenceModel, load_model

__all__ = ["InferenceModel", "load_model"]
