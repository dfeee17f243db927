"""What one rank sends in a training step, collective by collective.

B sequences of S tokens in a micro-batch, H features, V words of the vocabulary; n ranks in a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slope_dist.config import Config, Derived
from slope_dist.config.resolve import zero_stage
from slope_dist.parallel.layout import Layout, Position
from slope_dist.planning.model_state import ShareSize

Group = Literal["tensor", "data", "pipeline"]
Operation = Literal["all-reduce", "reduce-scatter", "all-gather", "send"]

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a parameter or activation."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """Equal collectives of a step.

    Attributes:
        group: over which ranks.
        what: is sent.
        operation: how.
        bytes: of the whole tensor that is reduced, gathered or sent.
        times: in a step.
        ranks: of the group.
    """

    group: Group
    what: str
    operation: Operation
    bytes: int
    times: int
    ranks: int

    @property
    def sent(self) -> int:
        """Bytes that one rank sends in a step, by the ring algorithm."""
        passes = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
        if self.operation == "send":
            return self.bytes * self.times
        return passes[self.operation] * (self.ranks - 1) * self.bytes * self.times // self.ranks


def group_of(config: Config, derived: Derived, group: Group) -> list[int]:
    """The ranks of the first rank's group."""
    layout = Layout(config.parallel.tensor, derived.data_ranks, config.parallel.pipeline)
    position = {
        "tensor": [Position(rank, 0, 0) for rank in range(layout.tensor)],
        "data": [Position(0, rank, 0) for rank in range(layout.data)],
        "pipeline": [Position(0, 0, rank) for rank in range(layout.pipeline)],
    }
    return [layout.rank(place) for place in position[group]]


def messages(config: Config, derived: Derived, stage: int, blocks: int, share: ShareSize) -> list[Message]:
    """All that a rank of a pipeline stage sends in a step, but for single numbers.

    Args:
        config: the run.
        derived: for its ranks.
        stage: which pipeline stage.
        blocks: how many it has.
        share: what a rank of it holds.
    """
    found = [
        *_tensor(config, derived, stage, blocks),
        *_pipeline(config, derived, stage),
        *_data(config, derived, share),
    ]
    return [message for message in found if message.ranks > 1 and message.times > 0]


def _activation(config: Config) -> int:
    """Bytes of a micro-batch in the residual stream, of all tensor ranks together."""
    model = config.model
    tokens = config.training.micro_batch_size * model.sequence_length
    return tokens * model.hidden_size * WIDTH[config.precision]


def _tensor(config: Config, derived: Derived, stage: int, blocks: int) -> Iterator[Message]:
    ranks, micro_batches = config.parallel.tensor, derived.accumulation_steps
    # Each block enters the split layers and leaves them twice, in forward and in backward: parallel/regions.py.
    # Recomputing stops before a block leaves them the second time, for backward needs nothing of what follows.
    recomputed = blocks if config.training.recompute == "blocks" else 0
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    size = _activation(config)

    def message(operation: Operation, times: int, size: int = size) -> Message:
        return Message(
            group="tensor",
            what="activations",
            operation=operation,
            bytes=size,
            times=times * micro_batches,
            ranks=ranks,
        )

    # The embedding leaves, and the head enters.
    if not config.parallel.sequence_parallel:
        yield message("all-reduce", 4 * blocks + recomputed + first + last)
        return
    yield message("all-gather", 4 * blocks + 2 * recomputed + first + last)
    yield message("reduce-scatter", 4 * blocks + recomputed + last)
    if first:
        # Ids are whole on every tensor rank, and so is what the table makes of them.
        yield message("all-reduce", 1)
        if config.model.family in ("opt", "gpt2"):
            # Learned positions, whose gradients are those of all tokens.
            yield message("all-gather", 1, size // config.training.micro_batch_size)


def _pipeline(config: Config, derived: Derived, stage: int) -> Iterator[Message]:
    ranks = config.parallel.pipeline
    part = _activation(config)
    if config.parallel.sequence_parallel:
        part //= config.parallel.tensor
    # Activations to the next stage, gradients to the one before.
    ways = (stage < ranks - 1) + (stage > 0)
    yield Message(
        group="pipeline",
        what="activations and their gradients",
        operation="send",
        bytes=part,
        times=ways * derived.accumulation_steps,
        ranks=ranks,
    )


def _data(config: Config, derived: Derived, share: ShareSize) -> Iterator[Message]:
    fsdp = config.parallel.engine == "fsdp"
    zero, ranks = 3 if fsdp else zero_stage(config), derived.data_ranks
    width = WIDTH[config.precision]
    gradient = 4 if config.parallel.gradient_dtype == "fp32" else width
    yield Message(
        group="data",
        what="gradients",
        # DeepSpeed all-reduces at stages 1 and 2, and each rank then keeps its part.
        operation="reduce-scatter" if zero == 3 else "all-reduce",
        bytes=share.trained * gradient,
        # What keeps only its part of the gradients gives away the rest after every micro-batch.
        times=derived.accumulation_steps if zero >= 2 else 1,
        ranks=ranks,
    )
    if zero in (1, 2):
        yield Message(
            group="data", what="weights", operation="all-gather", bytes=share.trained * width, times=1, ranks=ranks
        )
    if zero == 3:
        yield Message(
            group="data",
            what="weights and metadata",
            operation="all-gather",
            bytes=share.trained * width + share.metadata,
            # For forward and for backward, which recomputing shares.
            times=2 * derived.accumulation_steps,
            ranks=ranks,
        )
