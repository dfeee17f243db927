"""Which token comes next: the most probable, or one drawn from those that the settings leave."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from slope_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        temperature: logits are divided by it; 0: always the most probable token, of equals the lowest id.
        top_k: draw among so many of the most probable only; None: among all.
        top_p: then among the most probable of these that make up this share of their probability, at least one.
        seed: of the draws, which also depend on the prompt, and on nothing else.

    Raises:
        UserError: a value is out of its range, or has no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isfinite(self.temperature) or self.temperature < 0:
            raise UserError(f"temperature {self.temperature} is out of range; use 0 for the most probable, or above")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k} leaves no token; use 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is out of range; use one above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is out of range; use one from 0 to 2^63 - 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise UserError("top-k and top-p have no effect at temperature 0; set a temperature, or leave them out")

    def generator(self, prompt: Sequence[int], draw: int = 0) -> torch.Generator:
        """The random stream of the sequence that begins with the ids `prompt`, for the `draw`th time."""
        digest = hashlib.sha256(f"{self.seed} {draw} {' '.join(map(str, prompt))}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token: fp32 [V] on the CPU -> its id."""
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(self.probabilities(logits), 1, generator=generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, at a temperature above 0: fp32 [V] -> fp32 [V], 0 for tokens that are left out."""
        # The largest first, or a small temperature would make them infinite; and in fp64, for in fp32 it may be 0.
        scaled = ((logits - logits.max()).double() / self.temperature).to(logits.dtype)
        if self.top_k is not None and self.top_k < len(scaled):
            # Of the logits as they are: small ones may be equal once the largest is subtracted.
            most = logits.topk(self.top_k).indices
            scaled = torch.full_like(scaled, -torch.inf).scatter(0, most, scaled[most])
        probabilities = scaled.softmax(dim=0)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            # A token stays while those before it have not made up the share.
            left_out = ordered.cumsum(dim=0) - ordered >= self.top_p
            # Also of a share that is 0 in fp32.
            left_out[0] = False
            probabilities = probabilities.index_fill(0, order[left_out], 0.0)
            probabilities = probabilities / probabilities.sum()
        return probabilities
