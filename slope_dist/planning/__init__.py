"""What a run takes, before it is run."""

from slope_dist.planning.model_state import ModelState, model_state

__all__ = ["ModelState", "model_state"]
