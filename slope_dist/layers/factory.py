"""Makes a model's layers.

Models ask by role, name and size; storage, initial values and adapters are decided here (rule R4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from slope_dist.layers import initialization
from slope_dist.layers.linear import Linear, LowRankAdapter, Split
from slope_dist.layers.modules import Embedding, LayerNorm, TiedHead
from slope_dist.sparse import CompressedMatrix, DenseWeight, Pattern, SparseWeight, Weight


@dataclass
class LayerFactory:
    """How the layers of one model are stored and begun.

    Args:
        seed: `run.seed`; initial values follow from it and the layer's global name.
        pattern: N:M pattern of the sparse linears; None makes every linear dense.
        dense_layers: glob patterns over global names with the reason each is kept dense.
        hold_column_mask: the second mask is state (a mask interval above 1).
        resident_transpose: keep the doubly pruned transpose between uses.
        shard_metadata: metadata as a frozen parameter, for engines that shard parameters over data ranks.
        adapter_rank: rank of the adapters of the sparse linears; 0 means none in this phase.
        draw: False leaves initial values zero, for a model whose state is about to be loaded.
        device: where tensors are made; "meta" makes shapes only, for counting.
    """

    seed: int
    pattern: Pattern | None
    dense_layers: dict[str, str] = field(default_factory=dict)
    hold_column_mask: bool = False
    resident_transpose: bool = False
    shard_metadata: bool = False
    adapter_rank: int = 0
    draw: bool = True
    device: str = "cpu"
    sparse: list[str] = field(default_factory=list, init=False)
    dense: dict[str, str] = field(default_factory=dict, init=False)

    def linear(
        self, name: str, in_features: int, out_features: int, *, split: Split, std: float, bias: bool = True
    ) -> Linear:
        """A linear layer I = in_features -> O = out_features, cut as `split` says where there are tensor ranks."""
        reason = self._dense_reason(name)
        shape = (out_features, in_features)
        adapter = None
        if reason is not None or self.pattern is None:
            self.dense[name] = reason or "the run is dense"
            weight: Weight = DenseWeight(self._normal(f"{name}.weight", shape, std))
        else:
            self.sparse.append(name)
            if self._draws:
                # The mask comes from the fp32 draw, so it does not depend on the precision of the run.
                matrix = CompressedMatrix.prune(self._normal(f"{name}.weight", shape, std), self.pattern)
            else:
                matrix = CompressedMatrix.blank(shape, self.pattern, self.device)
            weight = SparseWeight(
                matrix,
                hold_column_mask=self.hold_column_mask,
                resident_transpose=self.resident_transpose,
                metadata_as_parameter=self.shard_metadata,
            )
            if self.adapter_rank:
                down = self._normal(f"{name}.adapter.down", (self.adapter_rank, in_features), 1.0, always=True)
                with torch.device(self.device):
                    adapter = LowRankAdapter(down, out_features)
        with torch.device(self.device):
            return Linear(name, weight, bias=bias, split=split, adapter=adapter)

    def embedding(self, name: str, rows: int, size: int, *, std: float) -> Embedding:
        """A table of `rows` vectors of `size`."""
        return Embedding(name, self._normal(f"{name}.weight", (rows, size), std))

    def tied_head(self, embedding: Embedding) -> TiedHead:
        """Logits from the table of `embedding`."""
        return TiedHead(embedding)

    def layer_norm(self, name: str, size: int) -> LayerNorm:
        """A layer norm over `size` features."""
        with torch.device(self.device):
            return LayerNorm(name, size)

    def summary(self) -> str:
        """Which linears are sparse, which are not and why: "sparse 45/48 linears; dense: ..."."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            groups.setdefault(reason, []).append(name)
        total = len(self.sparse) + len(self.dense)
        text = f"sparse {len(self.sparse)}/{total} linears"
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

    def _normal(self, name: str, shape: tuple[int, int], std: float, always: bool = False) -> Tensor:
        if not (self._draws or (always and self.device != "meta")):
            return torch.zeros(shape, device=self.device)
        return initialization.normal(self.seed, name, shape, std)


def _abbreviate(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
