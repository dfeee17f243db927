"""Taking over a stored state, into whatever memory an engine keeps its own in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from slope_dist.engine.optimizer import AdamW
from slope_dist.errors import UserError
from slope_dist.layers import LogicalTensor
from slope_dist.parallel import collectives
from slope_dist.parallel.fragments import Fragment, StateSource
from slope_dist.sparse import Pattern, SparseWeight, codec
from slope_dist.transfer import Transfer

CHUNK_BYTES = 4 * 2**20
"""Most of a fragment that is read at once. Small, so that it is checked and copied while it is in a cache."""

_INDICES, _COLUMN_MASK = ".indices", ".column_mask"


def index_patterns(tensors: Iterable[LogicalTensor], weights: Iterable[SparseWeight]) -> dict[str, Pattern]:
    """The pattern that the packed indices of each sparse weight must follow, by logical name."""
    patterns = {id(weight.indices): weight.pattern for weight in weights}
    return {tensor.name: patterns[id(tensor.tensor)] for tensor in tensors if id(tensor.tensor) in patterns}


@torch.no_grad()
def load_fragments(
    source: StateSource,
    fragments: Iterable[Fragment],
    patterns: Mapping[str, Pattern],
    *,
    keep: Collection[str] = (),
    transfer: Transfer | None = None,
) -> None:
    """Write a stored state into an engine's live fragments, except derived ones. Collective over all ranks.

    What the source returns is checked and then copied, chunk by chunk: what was checked is what is loaded. The extra
    memory is a few chunks, and the metadata of layers whose column masks are state.

    Args:
        source: where it is; its run may have had another precision.
        fragments: this rank's.
        patterns: of `index_patterns`.
        keep: names of tensors that stay as they are.
        transfer: told of the bytes that are read.

    Raises:
        UserError: on every rank, if on any a piece is missing, its metadata names no entries of the pattern, a column
            mask keeps a pruned entry, or a number is none.
    """
    wanted = [fragment for fragment in fragments if not fragment.derived and fragment.name not in keep]
    transfer = transfer or Transfer()
    transfer.begin(sum(fragment.tensor.nbytes for fragment in wanted))
    masked = {fragment.name.removesuffix(_COLUMN_MASK) for fragment in wanted if fragment.name.endswith(_COLUMN_MASK)}
    indices: dict[tuple[object, ...], Tensor] = {}
    with collectives.together():
        for fragment in (chunk for whole in wanted for chunk in _chunks(whole)):
            stored = _read(source, fragment)
            transfer.add(fragment.tensor.nbytes)
            _check_numbers(fragment, stored)
            place = fragment.rectangle, fragment.start, fragment.stop
            if fragment.name in patterns:
                if fragment.name.removesuffix(_INDICES) in masked:
                    indices[fragment.name, *place] = stored
                try:
                    codec.check(stored.view(1, -1), patterns[fragment.name])
                except ValueError as error:
                    raise UserError(f"the state to resume from holds bad metadata for {fragment.name}") from error
            elif fragment.name.endswith(_COLUMN_MASK):
                name = fragment.name.removesuffix(_COLUMN_MASK) + _INDICES
                kept = codec.pack_bits(codec.mask_of(indices.pop((name, *place)).view(1, -1), patterns[name]))
                if (stored & ~kept.view(-1)).any():
                    raise UserError(
                        f"the state to resume from holds a bad mask, {fragment.name}: it keeps what is pruned"
                    )
            fragment.tensor.copy_(stored)


def _chunks(fragment: Fragment) -> Iterator[Fragment]:
    """The fragment in pieces of at most `CHUNK_BYTES`; metadata and column mask of a layer are cut alike."""
    step = CHUNK_BYTES // fragment.tensor.element_size()
    for start in range(fragment.start, fragment.stop, step):
        stop = min(fragment.stop, start + step)
        tensor = fragment.tensor[start - fragment.start : stop - fragment.start]
        yield replace(fragment, start=start, stop=stop, tensor=tensor)


def _check_numbers(fragment: Fragment, stored: Tensor) -> None:
    """Refuse what no run can have saved: a step whose gradients are not finite changes nothing.

    Raises:
        UserError: naming the state.
    """
    if (stored.dtype == torch.uint8) != (fragment.tensor.dtype == torch.uint8):
        raise UserError(f"the state to resume from holds {fragment.kind} {fragment.name} as {stored.dtype}")
    # A sum is finite only if everything in it is, and takes a twentieth of the time; a large one may overflow.
    if stored.is_floating_point() and not isfinite(stored.sum()) and not stored.isfinite().all():
        raise UserError(f"the state to resume from holds NaN or infinity in {fragment.kind} {fragment.name}")
    if fragment.kind == "exp_avg_sq" and stored.numel() and stored.min() < 0:
        raise UserError(f"the state to resume from holds a negative mean of squares of {fragment.name}")


def _read(source: StateSource, fragment: Fragment) -> Tensor:
    """A fragment's state from a source whose run may have had another precision."""
    kind = fragment.kind
    # An fp32 model's weights are its masters: take the masters of a narrower run, and give its weights for them.
    if kind == "weight" and source.has(fragment.name, "master"):
        kind = "master"
    elif kind == "master" and not source.has(fragment.name, "master"):
        kind = "weight"
    try:
        return source.read(fragment.name, kind, fragment.rectangle, fragment.start, fragment.stop)
    except KeyError as error:
        raise UserError(f"the state to resume from lacks {kind} {fragment.name}: {error}") from error


def saved_steps(adam: AdamW, parameters: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """Adam's step counter of each group, which all of its `parameters` share."""
    return {name: int(adam.state[members[0]]["step"]) for name, members in parameters.items()}


@torch.no_grad()
def load_steps(source: StateSource, adam: AdamW, parameters: Mapping[str, Sequence[Tensor]]) -> None:
    """Set Adam's step counters of each group's `parameters`; those of a group the source does not know to 0."""
    for name, members in parameters.items():
        steps = source.scalars["optimizer_steps"].get(name, 0)
        for member in members:
            adam.state[member]["step"].fill_(steps)
