"""Copies that are no longer equal.

Several ranks hold the same tensors: data ranks whole weights and metadata (ZeRO 0 to 2) and at ZeRO 0 the optimizer's
state, tensor ranks the norms, row biases and one factor of each adapter, two pipeline stages the table that they share.
All of them compute the same updates of it, so the copies agree in every bit; one that does not has met a defect of
memory, of a processor or of the program, and training would go on with a model that no rank has whole.

Which tensors these are follows from nothing but their names and places: whatever two ranks hold under the same key
(name, kind, rectangle, range) is compared. What is sharded is held once, and not hashed. Caches, such as the transposes
of kept weights, are not compared.

A bit that flips in a weight of ZeRO 1 or 2 is gone after the next step, which makes all weights anew from their
masters; in metadata, in the optimizer's state and in ZeRO 0 it stays until it is found. A difference between tensor
ranks spreads to whatever they compute whole, so that several tensors may be named, of which one was the first.

Equal bits are a matter of equal arithmetic. On GPUs kernels whose sums have no fixed order may part what tensor ranks
compute whole, each for itself; `training.deterministic` leaves only those with one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slope_dist.comparing.finding import Finding, Hosts
from slope_dist.parallel import collectives
from slope_dist.parallel.fragments import Fragment

CHUNK = 2**20
_MOST_NAMED = 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_BETWEEN_CHUNKS = 6364136223846793005
"""Odd, so that multiplying by it loses no bit."""


def content_hash(tensor: Tensor) -> Tensor:
    """A number that follows from the bits of a tensor and their places: any dtype, any shape -> int64 scalar.

    The sum modulo 2^64 of (bits of an element as an integer) x (an odd number that follows from its place), computed
    where the tensor is, `CHUNK` elements at a time. Elements of 64 bits count as two.

    Tensors that differ in one element alone never have the same hash: an odd factor makes a multiplication one to one.
    Differences d_i in several elements cancel if sum(d_i w_i) = 0 modulo 2^64; taking the factors for random, with
    probability at most 2^-(63 - t), t being the zeros that the d_i share at their low ends: at most 31 for fp32, where
    only signs are flipped, so 2^-32 at worst. It is no protection against those who choose the bits.
    """
    # 0.0 and -0.0 are different bits, and NaN is equal to itself.
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    factors = _factors(min(CHUNK, bits.numel()), tensor.device)
    for chunk in bits.split(CHUNK):
        total = total * _BETWEEN_CHUNKS + (chunk.to(torch.int64) * factors[: chunk.numel()]).sum()
    return total


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers that look random, those of the first `count` places (the mixing of splitmix64): int64 [count]."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> 31) | 1


@dataclass(frozen=True)
class Difference:
    """A tensor whose copies differ.

    Attributes:
        tensor: its global name.
        kind: which of its states.
        ranks: those that differ from the majority; all that hold it if there is none.
        copies: how many ranks hold it.
    """

    tensor: str
    kind: str
    ranks: tuple[int, ...]
    copies: int


@dataclass(frozen=True)
class Comparison:
    """What a comparison found, the same on every rank.

    Attributes:
        compared: tensors that were held more than once, over all ranks.
        differences: those of them whose copies differ, first those of fewest ranks: a difference of one rank spreads.
    """

    compared: int
    differences: tuple[Difference, ...] = field(default_factory=tuple)


def compare(held: Iterable[Fragment]) -> Comparison:
    """Compare what all ranks hold. Collective.

    Args:
        held: what this rank does, each key once; hashed only where another rank has it too.
    """
    fragments = {_key(fragment): fragment for fragment in held}
    device = collectives.device()
    keys = _all_gather(torch.tensor(list(fragments), dtype=torch.int64, device=device))
    distinct, counts = torch.cat(keys).unique(return_counts=True)
    shared = set(distinct[counts > 1].tolist())
    if not shared:
        return Comparison(0)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    hashes = [content_hash(fragments[key].tensor).to(device) if key in shared else zero for key in fragments]
    gathered = _all_gather(torch.stack(hashes) if hashes else zero.new_empty(0))
    wrong = _differing(torch.cat(keys), torch.cat(gathered)) & shared
    if not wrong:
        return Comparison(len(shared))
    found: dict[int, dict[int, list[int]]] = {key: defaultdict(list) for key in wrong}
    for rank, (numbers, values) in enumerate(zip(keys, gathered, strict=True)):
        for key, value in zip(numbers.tolist(), values.tolist(), strict=True):
            if key in wrong:
                found[key][value].append(rank)
    # Who holds a tensor knows its name; one of its holders tells all.
    own = {}
    for key, by_value in found.items():
        if min(min(ranks) for ranks in by_value.values()) == collectives.rank():
            own[str(key)] = [fragments[key].name, fragments[key].kind]
    names = {key: name for told in collectives.all_gather_json(own) for key, name in told.items()}
    differences = (_difference(names[str(key)], by_value) for key, by_value in found.items())
    return Comparison(len(shared), tuple(sorted(differences, key=lambda d: (len(d.ranks), d.tensor, d.kind))))


def _difference(name: Sequence[str], by_value: dict[int, list[int]]) -> Difference:
    copies = sum(map(len, by_value.values()))
    majority: list[int] = max(by_value.values(), key=len)
    right = majority if 2 * len(majority) > copies else []
    ranks = sorted(rank for ranks in by_value.values() if ranks is not right for rank in ranks)
    return Difference(name[0], name[1], tuple(ranks), copies)


def _key(fragment: Fragment) -> int:
    """A number, never 0, for what a fragment is a copy of."""
    text = f"{fragment.kind} {fragment.name} {fragment.rectangle} {fragment.start} {fragment.stop}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True) | 1


def _differing(keys: Tensor, values: Tensor) -> set[int]:
    """Keys that stand beside more than one value."""
    pairs = torch.stack([keys, values], dim=1).unique(dim=0)
    distinct, counts = pairs[:, 0].unique(return_counts=True)
    return set(distinct[counts > 1].tolist())


def _all_gather(own: Tensor) -> list[Tensor]:
    """Every rank's int64 [n], n its own, in rank order."""
    if collectives.world_size() == 1:
        return [own]
    sizes = [own.new_empty(1) for _ in range(collectives.world_size())]
    dist.all_gather(sizes, own.new_tensor([own.numel()]))
    counts = [int(size) for size in sizes]
    padded = own.new_zeros(max(1, *counts))
    padded[: own.numel()] = own
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


class Drift:
    """Compares, and tells of a difference once. Every rank calls `look` at the same steps."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._before: tuple[Difference, ...] = ()
        self._clean_step: int | None = None

    def look(self, step: int, held: Iterable[Fragment]) -> list[Finding]:
        """What has changed since the last look. Collective."""
        differences = compare(held).differences
        changed = differences != self._before
        self._before = differences
        findings = [self._finding(step, differences)] if changed else []
        if not differences:
            self._clean_step = step
        return findings

    def _finding(self, step: int, differences: tuple[Difference, ...]) -> Finding:
        # Per tensor what a person needs first; the number says how many there are.
        shown: list[dict[str, Any]] = [
            {
                "tensor": d.tensor,
                "kind": d.kind,
                "ranks": list(d.ranks),
                "hosts": sorted({self._hosts[rank] for rank in d.ranks}),
                "copies": d.copies,
            }
            for d in differences[:_MOST_NAMED]
        ]
        row = {"drift": {"tensors": len(differences), "shown": shown, "last_equal_step": self._clean_step}}
        scalars = {"watch/drifted_tensors": float(len(differences))}
        if not differences:
            return Finding(f"all copies are equal again after step {step}", row, scalars)
        first = shown[0]
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        since = "never compared before" if self._clean_step is None else f"equal after step {self._clean_step}"
        line = (
            f"warning: after step {step} copies of {first['kind']} {first['tensor']}{more} differ: ranks "
            f"{', '.join(map(str, first['ranks']))} of {first['copies']} (on {', '.join(first['hosts'])}); {since}"
        )
        return Finding(line, row, scalars, damage=True)
