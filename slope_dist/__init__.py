"""Sparse pretraining of large language models with SLoPe (arXiv 2405.16325)."""

import warnings

__version__ = "0.1.0"

# Megatron-core says at its import, in several places and on every rank, that optional GPU packages are absent, whose
# parts nothing here uses.
warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)
