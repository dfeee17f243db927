"""Where two checkpoints differ: what they say of their runs, and every logical tensor, whatever layouts wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope_dist.checkpoint.format import Manifest, StoredTensor
from slope_dist.checkpoint.reader import Checkpoint
from slope_dist.checkpoint.streaming import TensorStream, squared_norm
from slope_dist.transfer import Transfer


class Absent:
    """What stands for a field that one side does not have; JSON has no such value."""


ABSENT = Absent()


class FieldDifference(NamedTuple):
    """A field of the two manifests: its path, and its JSON value or `ABSENT` on each side."""

    path: tuple[str, ...]
    there: Any
    here: Any


class TensorDifference(NamedTuple):
    """A logical tensor that is not the same, bit for bit.

    Attributes:
        key: "<kind>/<global name>".
        form: its dtypes and shapes, "F32 [4] there, BF16 [4] here", where these differ; else "".
        elements: how many differ; of tensors of one dtype, in any bit.
        of: how many there are.
        largest: largest absolute difference of two elements; None where it means nothing: of metadata and other shapes.
        relative: norm of the difference over that of the tensor there; None as above.
    """

    key: str
    form: str
    elements: int
    of: int
    largest: float | None
    relative: float | None


@dataclass(frozen=True)
class Differences:
    """What differs between a checkpoint "here" and another "there".

    Attributes:
        fields: step, scalars, identity, config and versions.
        only_here: keys of tensors that the other lacks.
        only_there: keys of tensors that the one lacks.
        tensors: those of both that are not equal.
        compared: tensors that both have.
    """

    fields: list[FieldDifference]
    only_here: list[str]
    only_there: list[str]
    tensors: list[TensorDifference]
    compared: int

    @property
    def equal(self) -> bool:
        """Whether the logical tensors are the same; what else is said of the two runs may differ."""
        return not (self.only_here or self.only_there or self.tensors)


def compare(here: Checkpoint, there: Checkpoint, transfer: Transfer | None = None) -> Differences:
    """Compare two checkpoints, reading both to the end.

    Args:
        here: the one.
        there: the other; differences are relative to it.
        transfer: told of the bytes that are read from `here`.

    Raises:
        CheckpointError: if a file does not hold what its manifest says, or changes.
    """
    ours, theirs = here.manifest.tensors, there.manifest.tensors
    common = sorted(ours.keys() & theirs.keys())
    streams = TensorStream(here, transfer), TensorStream(there)
    streams[0].begin(common)
    found = (_compare_tensor(streams, key, ours[key], theirs[key]) for key in common)
    return Differences(
        fields=_compare_fields(here.manifest, there.manifest),
        only_here=sorted(ours.keys() - theirs.keys()),
        only_there=sorted(theirs.keys() - ours.keys()),
        tensors=[difference for difference in found if difference is not None],
        compared=len(common),
    )


def _compare_fields(here: Manifest, there: Manifest) -> list[FieldDifference]:
    sections = ("step", "scalars", "identity", "config", "versions")
    ours, theirs = (_leaves({name: getattr(side, name) for name in sections}) for side in (here, there))
    return [
        FieldDifference(path, theirs.get(path, ABSENT), ours.get(path, ABSENT))
        for path in sorted({*ours, *theirs})
        if _canonical(ours.get(path, ABSENT)) != _canonical(theirs.get(path, ABSENT))
    ]


def _leaves(section: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """All values that are no objects with members, by path."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            leaves |= {(key, *path): leaf for path, leaf in _leaves(value).items()}
        else:
            leaves[key,] = value
    return leaves


def _canonical(value: Any) -> str:
    # As text, 1 is neither 1.0 nor true, and NaN is NaN.
    return "" if value is ABSENT else json.dumps(value, sort_keys=True)


def _compare_tensor(
    streams: tuple[TensorStream, TensorStream], key: str, ours: StoredTensor, theirs: StoredTensor
) -> TensorDifference | None:
    form = ""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        form = f"{theirs.dtype} {list(theirs.shape)} there, {ours.dtype} {list(ours.shape)} here"
    size = prod(ours.shape)
    if ours.shape != theirs.shape:
        return TensorDifference(key, form, size, size, None, None)
    elements, largest, squares = 0, 0.0, 0.0
    for (_, here), (_, there) in zip(streams[0].chunks(key), streams[1].chunks(key), strict=True):
        differing = _differing(here, there)
        difference = (here[differing].double() - there[differing].double()).abs_()
        if len(difference):
            elements += len(difference)
            # Not `max` of Python, which drops a NaN that comes second.
            largest = float(torch.maximum(difference.max(), torch.tensor(largest, dtype=torch.float64)))
            squares += squared_norm(difference)
    if not elements and not form:
        return None
    if "U8" in (ours.dtype, theirs.dtype):
        return TensorDifference(key, form, elements, size, None, None)
    norm = sqrt(sum(squared_norm(chunk) for _, chunk in streams[1].chunks(key))) if elements else 0.0
    relative = 0.0 if squares == 0.0 else sqrt(squares) / norm if norm != 0.0 else inf
    return TensorDifference(key, form, elements, size, largest, relative)


def _differing(here: Tensor, there: Tensor) -> Tensor:
    """Which elements are not the same: in any bit where dtypes agree, in value where they do not."""
    if here.dtype != there.dtype:
        return here.double() != there.double()
    if here.dtype == torch.uint8:
        return here != there
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[here.element_size()]
    return here.view(bits) != there.view(bits)
