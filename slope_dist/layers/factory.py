"""Makes a model's layers.

Models ask by role, name and size; storage, the part of this rank, initial values and adapters are decided here
(rule R4).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from slope_dist.layers import initialization
from slope_dist.layers.linear import Linear, LowRankAdapter, Split
from slope_dist.layers.modules import Embedding, Head, LayerNorm, NextTokenLoss, RMSNorm, SplitInput, StreamEntry
from slope_dist.parallel.regions import TensorPlace
from slope_dist.sparse import CompressedMatrix, DenseWeight, Pattern, SparseWeight, Weight, pattern_of

ROW_MULTIPLE = 8
"""A tensor rank's part of the vocabulary is a multiple of this."""


@dataclass
class LayerFactory:
    """How the layers of one model are stored, placed and begun.

    Args:
        seed: `run.seed`; initial values follow from it and the layer's global name.
        pattern: N:M pattern of the sparse linears; None makes every linear dense.
        layer_patterns: "GLOB=N:M" over global names: another pattern for those that match; the first counts.
        dense_layers: glob patterns over global names with the reason each is kept dense.
        hold_column_mask: the second mask is state (a mask interval above 1).
        resident_transpose: keep the doubly pruned transpose between uses.
        shard_metadata: metadata as a frozen parameter, for engines that shard parameters over data ranks.
        adapter_rank: rank of the adapters of the sparse linears; 0 means none in this phase.
        draw: False leaves initial values zero, for a model whose state is about to be loaded.
        device: where tensors are made; "meta" makes shapes only, for counting.
        place: this rank among the tensor ranks.
    """

    seed: int
    pattern: Pattern | None
    dense_layers: dict[str, str] = field(default_factory=dict)
    layer_patterns: tuple[str, ...] = ()
    hold_column_mask: bool = False
    resident_transpose: bool = False
    shard_metadata: bool = False
    adapter_rank: int = 0
    draw: bool = True
    device: str = "cpu"
    place: TensorPlace = field(default_factory=TensorPlace)
    sparse: dict[str, Pattern] = field(default_factory=dict, init=False)
    dense: dict[str, str] = field(default_factory=dict, init=False)
    _tables: dict[str, nn.Parameter] = field(default_factory=dict, init=False)

    def linear(
        self, name: str, in_features: int, out_features: int, *, split: Split, std: float, bias: bool = True
    ) -> Linear:
        """A linear layer I = in_features -> O = out_features (of the whole layer), cut as `split` says.

        A layer that is "whole" computes in the residual stream, on every tensor rank, and is dense: no block has one.
        """
        reason = self._dense_reason(name) or ("outside the blocks" if split == "whole" else None)
        shape = (out_features, in_features)
        rows = self.place.share(out_features) if split == "column" else (0, out_features)
        columns = self.place.share(in_features) if split == "row" else (0, in_features)
        adapter = None
        if reason is not None or self.pattern is None:
            self.dense[name] = reason or "the run is dense"
            weight: Weight = DenseWeight(self._normal(f"{name}.weight", shape, std, rows, columns))
        else:
            pattern = self.sparse[name] = pattern_of(name, str(self.pattern), self.layer_patterns)
            if self._draws:
                # The mask comes from the fp32 draw, so it does not depend on the precision of the run.
                drawn = self._normal(f"{name}.weight", shape, std, rows, columns)
                matrix = CompressedMatrix.prune(drawn, pattern)
            else:
                local = (rows[1] - rows[0], columns[1] - columns[0])
                matrix = CompressedMatrix.blank(local, pattern, self.device)
            weight = SparseWeight(
                matrix,
                hold_column_mask=self.hold_column_mask,
                resident_transpose=self.resident_transpose,
                metadata_as_parameter=self.shard_metadata,
            )
            if self.adapter_rank:
                assert split != "whole"
                factor = (self.adapter_rank, in_features)
                down = self._normal(f"{name}.adapter.down", factor, 1.0, (0, self.adapter_rank), columns, always=True)
                with torch.device(self.device):
                    adapter = LowRankAdapter(down, weight.shape[0], split=split, place=self.place)
        with torch.device(self.device):
            return Linear(name, weight, bias=bias, split=split, adapter=adapter, place=self.place)

    def embedding(self, name: str, rows: int, size: int, *, std: float) -> Embedding:
        """A table of `rows` vectors of `size`, whole on every rank."""
        table = self._normal(f"{name}.weight", (rows, size), std, (0, rows), (0, size))
        return Embedding(name, table, self.place)

    def token_embedding(self, name: str, rows: int, size: int, *, std: float) -> nn.Module:
        """The table of the vocabulary, cut by rows over the tensor ranks and padded to equal parts."""
        table = self._token_table(name, rows, size, std)
        if self.place.ranks == 1:
            layer: nn.Module = Embedding(name, table)
        elif self.place.group is None:
            layer = _UnconnectedEmbedding(name, table, rows, self.place)
        else:
            from slope_dist.layers.vocabulary import SplitEmbedding

            layer = SplitEmbedding(name, table, rows, self.place)
        self._tables[name] = layer.weight  # type: ignore[assignment]
        return layer

    def tied_head(self, name: str, rows: int, size: int, *, std: float) -> Head:
        """Logits from the token table called `name`: the same parameter where this factory has made it.

        Where it lives on another pipeline stage, the head has a copy, with the same values.
        """
        if name in self._tables:
            return Head(self._tables[name], self._used_rows(rows))
        return TiedHeadCopy(name, self._token_table(name, rows, size, std), rows, self._used_rows(rows), self.place)

    def head(self, name: str, rows: int, size: int, *, std: float) -> Head:
        """Logits from a table of its own, cut and padded like that of the tokens."""
        return NamedHead(name, self._token_table(name, rows, size, std), rows, self._used_rows(rows), self.place)

    def _used_rows(self, rows: int) -> int | None:
        """How many of this rank's rows of the padded table stand for tokens; None where nothing pads."""
        if self.place.ranks == 1:
            return None
        start, stop = self.place.share(self._padded_rows(rows))
        return max(0, min(stop, rows) - start)

    def layer_norm(self, name: str, size: int, *, epsilon: float = 1e-5) -> LayerNorm:
        """A layer norm over `size` features, in the residual stream."""
        with torch.device(self.device):
            return LayerNorm(name, size, self.place, epsilon=epsilon)

    def rms_norm(self, name: str, size: int, *, epsilon: float = 1e-5) -> RMSNorm:
        """A root-mean-square norm over `size` features, in the residual stream."""
        with torch.device(self.device):
            return RMSNorm(name, size, self.place, epsilon=epsilon)

    def split_input(self) -> SplitInput:
        """Where the residual stream enters column-split linears or the head; one for all that read the same."""
        return SplitInput(self.place)

    def stream_entry(self) -> StreamEntry:
        """Where the embedding's output enters the residual stream."""
        return StreamEntry(self.place)

    def next_token_loss(self) -> NextTokenLoss:
        """The mean loss from the head's output."""
        if self.place.group is None:
            return NextTokenLoss()
        from slope_dist.layers.vocabulary import SplitNextTokenLoss

        return SplitNextTokenLoss()

    def summary(self) -> str:
        """Which linears are sparse, which are not and why: "sparse 45/48 linears; dense: ..."."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            groups.setdefault(reason, []).append(name)
        total = len(self.sparse) + len(self.dense)
        counts = Counter(str(pattern) for pattern in self.sparse.values())
        text = f"sparse {len(self.sparse)}/{total} linears"
        if len(counts) > 1:
            text += f" ({', '.join(f'{count} {pattern}' for pattern, count in counts.items())})"
        if not groups:
            return text
        parts = [
            f"{_abbreviate(names)} ({reason})" if reason != "the run is dense" else f"all ({reason})"
            for reason, names in groups.items()
        ]
        return f"{text}; dense: {', '.join(parts)}"

    def _dense_reason(self, name: str) -> str | None:
        for glob, reason in self.dense_layers.items():
            if fnmatchcase(name, glob):
                return reason
        return None

    @property
    def _draws(self) -> bool:
        return self.draw and self.device != "meta"

    def _padded_rows(self, rows: int) -> int:
        together = ROW_MULTIPLE * self.place.ranks
        return rows if self.place.ranks == 1 else -(-rows // together) * together

    def _token_table(self, name: str, rows: int, size: int, std: float) -> Tensor:
        """This rank's rows; those that pad are zero."""
        start, stop = self.place.share(self._padded_rows(rows))
        used = (min(start, rows), min(stop, rows))
        table = self._normal(f"{name}.weight", (rows, size), std, used, (0, size))
        padding = torch.zeros(stop - start - table.shape[0], size, device=self.device)
        return torch.cat([table, padding]) if len(padding) else table

    def _normal(
        self,
        name: str,
        shape: tuple[int, int],
        std: float,
        rows: tuple[int, int],
        columns: tuple[int, int],
        always: bool = False,
    ) -> Tensor:
        if not (self._draws or (always and self.device != "meta")):
            return torch.zeros(rows[1] - rows[0], columns[1] - columns[0], device=self.device)
        return initialization.normal(self.seed, name, shape, std, rows, columns)


class _UnconnectedEmbedding(Embedding):
    """A share of the token table of a rank that has no group: to be counted and drawn, not run."""

    def __init__(self, name: str, table: Tensor, rows: int, place: TensorPlace) -> None:
        super().__init__(name, table, place)
        self.rows = rows

    def split_dim(self, relative: str) -> int | None:
        """Rows are cut."""
        return 0


class NamedHead(Head):
    """A head whose table is a logical tensor of its own."""

    def __init__(self, name: str, table: Tensor, rows: int, used_rows: int | None, place: TensorPlace) -> None:
        super().__init__(nn.Parameter(table), used_rows)
        self.name = name
        self.rows = rows
        self.place = place

    def split_dim(self, relative: str) -> int | None:
        """Rows are cut."""
        return 0


class TiedHeadCopy(NamedHead):
    """A head whose table is that of another pipeline stage: a second copy, kept equal by the pipeline engine."""

    is_copy = True


def _abbreviate(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
