"""Sparse pretraining of large language models with SLoPe (arXiv 2405.16325)."""

__version__ = "0.1.0"
