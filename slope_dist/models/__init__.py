"""Model families: plain modules that know nothing of ranks, collectives or sparsity (rule R4)."""

from slope_dist.models.decoding import Decoding
from slope_dist.models.registry import Family, LanguageModel, build_model, family
from slope_dist.models.shape import ModelShape, Rotary

__all__ = ["Decoding", "Family", "LanguageModel", "ModelShape", "Rotary", "build_model", "family"]
