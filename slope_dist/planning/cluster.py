"""The machines that a run is planned for: which GPUs, how many, and how fast they reach each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slope_dist.errors import UserError
from slope_dist.planning.gpus import GIGA, GPU_MEMORY, Peaks, peaks_of_kind

_INSIDE = {"a100-40gb": 300, "a100-80gb": 300, "h100-80gb": 450, "h200-141gb": 450}
"""GB/s that one GPU sends to the others of its node at most: NVLink 3 and 4, half of the 600 and 900 GB/s that the
maker gives for both directions together."""

_BETWEEN = {"a100-40gb": 25, "a100-80gb": 25, "h100-80gb": 50, "h200-141gb": 50}
"""GB/s that one GPU sends to other nodes at most: a 200 and a 400 Gbit/s adapter for each GPU, as in the maker's own
machines (DGX A100 and H100). Many clusters have less."""

MOST_GPUS = 2**20

REACHED = 0.8
"""The share of those that collectives of large tensors are taken to reach. An assumption, not measured here."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of like GPUs.

    Attributes:
        gpu: kind, one of `GPU_MEMORY`.
        gpus_per_node: ranks of a node.
        nodes: how many.
        inside: bytes a second that one GPU sends within its node, as collectives reach them.
        between: the same to other nodes.
    """

    gpu: str
    gpus_per_node: int
    nodes: int
    inside: float
    between: float

    @classmethod
    def of(
        cls,
        gpu: str,
        gpus_per_node: int,
        nodes: int,
        inside_gb: float | None = None,
        between_gb: float | None = None,
    ) -> Cluster:
        """A cluster with the bandwidths, in GB/s a GPU and direction, that are given, else those of the kind.

        Raises:
            UserError: for an unknown kind, or numbers that are not positive.
        """
        if gpu not in GPU_MEMORY:
            raise UserError(f"--gpu {gpu}: unknown; it can be {', '.join(GPU_MEMORY)}")
        for name, value in (
            ("--gpus-per-node", gpus_per_node),
            ("--nodes", nodes),
            ("--inside-gb", inside_gb),
            ("--between-gb", between_gb),
        ):
            if value is not None and not value > 0:
                raise UserError(f"{name} {value}: must be more than 0")
        for name, value in (("--inside-gb", inside_gb), ("--between-gb", between_gb)):
            if value is not None and not 1e-3 <= value <= 1e6:
                raise UserError(f"{name} {value:g}: must be from 0.001 to 1,000,000")
        if gpus_per_node * nodes > MOST_GPUS:
            raise UserError(f"--gpus-per-node {gpus_per_node} x --nodes {nodes}: at most {MOST_GPUS:,} GPUs")
        inside = REACHED * _INSIDE[gpu] if inside_gb is None else inside_gb
        between = REACHED * _BETWEEN[gpu] if between_gb is None else between_gb
        return cls(gpu, gpus_per_node, nodes, inside * GIGA, between * GIGA)

    @property
    def gpus(self) -> int:
        """All of them, a rank each."""
        return self.gpus_per_node * self.nodes

    @property
    def memory(self) -> int:
        """Bytes of one GPU."""
        return GPU_MEMORY[self.gpu]

    @property
    def peaks(self) -> Peaks:
        """What one GPU can do at most."""
        return peaks_of_kind(self.gpu)

    def bandwidth(self, ranks: Sequence[int]) -> float:
        """Bytes a second that each rank of a group sends in a collective.

        Within a node, over its own links. A group that spans nodes has as many adapters at each as it has ranks there.
        """
        nodes = {rank // self.gpus_per_node for rank in ranks}
        if len(nodes) <= 1:
            return self.inside
        return min(self.inside, self.between * len(ranks) / len(nodes))
