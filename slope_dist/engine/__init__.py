"""What turns a model into a trainable one over many ranks, behind one small interface."""

from slope_dist.engine.interface import Engine, StepResult

__all__ = ["Engine", "StepResult"]
