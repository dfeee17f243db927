"""A vocabulary cut over tensor ranks, on Megatron-core's embedding and cross-entropy.

Imported only where there are tensor ranks: Megatron-core takes seconds to import.
"""

from __future__ import annotations

from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy
from torch import Tensor, nn

from slope_dist.layers.modules import NextTokenLoss
from slope_dist.parallel.regions import TensorPlace


class SplitEmbedding(VocabParallelEmbedding):
    """A table of which this rank holds some rows: ids int64 [...] -> [..., H], the same on every tensor rank."""

    def __init__(self, name: str, table: Tensor, rows: int, place: TensorPlace) -> None:
        super().__init__(
            table.shape[0] * place.ranks,
            table.shape[1],
            init_method=lambda weight: weight,
            # An empty table on the CPU, whose place ours takes.
            config=ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
            tp_group=place.group,
        )
        self.name = name
        self.place = place
        self.rows = rows
        self.weight = nn.Parameter(table)

    def split_dim(self, relative: str) -> int | None:
        """Rows are cut."""
        return 0


class SplitNextTokenLoss(NextTokenLoss):
    """The loss from logits of which each tensor rank holds those of its rows."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, S, V / ranks], int64 [B, S] -> scalar."""
        counted = labels != self.IGNORED_LABEL
        losses = vocab_parallel_cross_entropy(logits, labels)
        return (losses * counted).sum() / counted.sum()
