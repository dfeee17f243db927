"""How well a run uses its GPUs: MFU on the basis of dense-equivalent operations, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slope_dist.config import Config, Derived
from slope_dist.parallel import collectives
from slope_dist.planning.flops import BASIS, TrainingFlops, count_flops, model_flops_utilization
from slope_dist.planning.gpus import TERA, peaks_of
from slope_dist.planning.shapes import shape_of
from slope_dist.training.build import build, layer_factory


@dataclass(frozen=True)
class Utilization:
    """What turns tokens a second of all ranks into a share of what their cards could do.

    Attributes:
        flops_per_token: dense-equivalent, forward and backward.
        ranks: with a card each.
        peak: dense operations a second of one card; None where there is no MFU.
        basis: what is divided by what, or why nothing is: one line.
    """

    flops_per_token: float
    ranks: int
    peak: float | None
    basis: str

    def mfu(self, tokens_per_second: float) -> float | None:
        """A share of 1; None where there is none to give."""
        if self.peak is None:
            return None
        return model_flops_utilization(self.flops_per_token, tokens_per_second, self.peak, self.ranks)

    def shown(self, tokens_per_second: float) -> list[str]:
        """For the progress line; nothing on a CPU."""
        mfu = self.mfu(tokens_per_second)
        if mfu is not None:
            return [f"MFU {100 * mfu:.1f} % ({BASIS})"]
        if not torch.cuda.is_available():
            return []
        return [f"{self.flops_per_token * tokens_per_second / self.ranks / TERA:.1f} {BASIS} TFLOP/s a GPU"]


def find_utilization(config: Config, derived: Derived) -> Utilization:
    """Count the run's arithmetic and look up its cards. Collective."""
    factory = layer_factory(config, derived, adapters=True, device="meta")
    flops = count_flops(build(config, factory), shape_of(config.model))
    cards = collectives.all_gather_json(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    return utilization_of(flops, cards, config.precision)


def utilization_of(flops: TrainingFlops, cards: list[str | None], precision: str) -> Utilization:
    """From the names of all ranks' cards, None for a CPU."""
    names = sorted({name or "a CPU" for name in cards})
    peaks = peaks_of(names[0])
    peak = None
    if cards[0] is None:
        basis = "no MFU: on a CPU there is no peak to compare with"
    elif len(names) > 1:
        basis = f"no MFU: the ranks' cards differ: {', '.join(names)}"
    elif peaks is None:
        basis = f'no MFU: no peak is known here of "{names[0]}"'
    elif precision == "fp32":
        basis = "no MFU: the peaks known here are of 16-bit products, and precision is fp32"
    else:
        peak = peaks.dense
        adapters = f", adapters not counted ({flops.adapters / 1e9:.3g} GFLOP)" if flops.adapters else ""
        basis = (
            f"MFU ({BASIS}): {flops.dense_equivalent / 1e9:.3g} GFLOP a token, forward and backward of the dense model"
            f"{adapters}, of {peak / TERA:g} TFLOPS, the dense 16-bit peak of {names[0]}"
        )
    return Utilization(flops.dense_equivalent, len(cards), peak, basis)
