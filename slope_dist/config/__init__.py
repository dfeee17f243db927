"""One JSON file describes a run: its schema, strict loading, what follows from it, and DeepSpeed's dictionary."""

from slope_dist.config.deepspeed import deepspeed_dict
from slope_dist.config.loading import dump_config, load_config
from slope_dist.config.resolve import Derived, derive, run_folder
from slope_dist.config.schema import Config

__all__ = ["Config", "Derived", "deepspeed_dict", "derive", "dump_config", "load_config", "run_folder"]
