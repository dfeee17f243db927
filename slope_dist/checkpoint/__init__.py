"""Checkpoints: a layout-free format on disk, its writer and reader, saving beside training, what stays of old ones.

docs/checkpoint-format.md describes the format for a stranger who would write a reader.
"""

from slope_dist.checkpoint.format import CheckpointError
from slope_dist.checkpoint.reader import Checkpoint, Search, find_newest, find_newest_on_all_ranks
from slope_dist.checkpoint.retention import Retention
from slope_dist.checkpoint.saver import Outcome, Saver
from slope_dist.checkpoint.writer import save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Outcome",
    "Retention",
    "Saver",
    "Search",
    "find_newest",
    "find_newest_on_all_ranks",
    "save",
]
