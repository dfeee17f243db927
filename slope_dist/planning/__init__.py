"""What a run takes, before it is run."""

from slope_dist.planning.gpus import GPU_MEMORY
from slope_dist.planning.model_state import ModelState, ParameterCount, ShareSize, Storage, count_parameters, measure

__all__ = ["GPU_MEMORY", "ModelState", "ParameterCount", "ShareSize", "Storage", "count_parameters", "measure"]
