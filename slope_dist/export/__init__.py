"""Models out of the trainer, and back: forms of files that others load, each readable as a `StoredModel`."""

from slope_dist.export.opening import open_model
from slope_dist.export.stored import LinearForm, StoredModel

__all__ = ["LinearForm", "StoredModel", "open_model"]
