"""Checkpoints whose every hash is right and whose content is not: what only the loading of a state can refuse.

Each is met by the real entry point, on one rank or two, in forked processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.distributed import end_ranks
from tests.faults.damage import change_elements, reseal
from tests.faults.refusal import MAX_LINE, listing
from tests.faults.shared import CHANGES, NEWEST, GoodRun, link_files
from tests.runs import pretrain, write_config

LIMIT = 150.0
_FC1 = "decoder.layers.0.fc1.weight"
_NAN, _INFINITY = float("nan"), float("inf")


class Lie(NamedTuple):
    """`tell`(folder) changes a good checkpoint and seals it again; its refusal holds `said`."""

    what: str
    tell: Callable[[Path], object]
    said: str


class HostileState:
    """One lie after the other; every third is met by two ranks."""

    def __init__(self, shared: Path) -> None:
        self.good = GoodRun(shared)

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        lie = LIES[index % len(LIES)]
        config = write_config(room, self.good.corpus, **CHANGES)
        checkpoints = room / "run" / "checkpoints"
        checkpoints.mkdir(parents=True)
        link_files(self.good.checkpoints / NEWEST, checkpoints / NEWEST)
        lie.tell(checkpoints / NEWEST)
        before = listing(room)
        outcomes = end_ranks(resume, 1 + (index % 3 == 0), str(config), process_group=False, timeout=100)
        problem = _problem(outcomes, lie.said)
        if problem is None:
            # A new run writes its folder's config and metrics; nothing else may change, and no checkpoint may.
            after = listing(room)
            changed = sorted(path for path in before if before[path] != after.get(path) and not _is_run(path, room))
            new = sorted(path for path in after.keys() - before.keys() if not _is_run(path, room))
            problem = f"files were changed: {changed + new}" if changed or new else None
        return problem and f"{lie.what}: {problem}"


def resume(config: str) -> None:
    """A rank of the run that meets the lie."""
    raise SystemExit(pretrain("--config", config))


def _is_run(path: str, room: Path) -> bool:
    return f"{path}/".startswith(f"{room}/run/") and not path.startswith(f"{room}/run/checkpoints/")


def _problem(outcomes: list[Any], said: str) -> str | None:
    errors = [line for outcome in outcomes for line in outcome.errors.splitlines() if line.startswith("error: ")]
    codes = [outcome.code for outcome in outcomes]
    if codes != [2] * len(outcomes):
        return f"exit codes {codes}: {'; '.join(errors) or 'it was loaded without a word'}"
    if len(errors) != 1 or len(errors[0]) > MAX_LINE or any("Traceback" in outcome.errors for outcome in outcomes):
        return f"not one line: {errors}"
    return None if said in errors[0] else f"{said!r} is not said in: {errors[0]}"


def _bytes(tensor: str, value: int, piece: int = 0) -> Callable[[Path], object]:
    """Put a byte of metadata into a tensor."""

    def change(elements: np.ndarray) -> None:
        elements[len(elements) // 2] = value

    return lambda folder: change_elements(folder, tensor, change, piece)


def _number(tensor: str, value: float, piece: int = 0) -> Callable[[Path], object]:
    """Put a number into an fp32 tensor."""

    def change(elements: np.ndarray) -> None:
        elements[-1] = value

    return lambda folder: change_elements(folder, tensor, change, piece)


def _renamed(tensor: str) -> Callable[[Path], object]:
    """Let a tensor have another name, so that the one that is wanted is not there."""
    return lambda folder: reseal(
        folder, lambda content: content["tensors"].update({f"{tensor}.x": content["tensors"].pop(tensor)})
    )


def _swapped_names(first: str, second: str) -> Callable[[Path], object]:
    """Let two tensors of different shapes have each other's name."""

    def change(content: dict[str, Any]) -> None:
        tensors = content["tensors"]
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return lambda folder: reseal(folder, change)


def _scalars(**changes: Any) -> Callable[[Path], object]:
    """Let the manifest say other scalars; None leaves one out."""

    def change(content: dict[str, Any]) -> None:
        content["scalars"].update(changes)
        content["scalars"] = {name: value for name, value in content["scalars"].items() if value is not None}

    return lambda folder: reseal(folder, change)


def _content(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: reseal(folder, lambda content: content.update(changes))


_INDICES = f"metadata/{_FC1}.indices"
LIES = [
    Lie("positions (1, 1) in 2:4 metadata", _bytes(_INDICES, 0b0100_0101), f"bad metadata for {_FC1}.indices"),
    Lie("positions (2, 1) in 2:4 metadata", _bytes(_INDICES, 0b0110_0100), f"bad metadata for {_FC1}.indices"),
    Lie("positions (3, 3), second rank's", _bytes(_INDICES, 0b1111_0100, 1), f"bad metadata for {_FC1}.indices"),
    Lie("positions (0, 0) everywhere", _bytes(_INDICES, 0), f"bad metadata for {_FC1}.indices"),
    Lie("all columns kept in a held mask", _bytes(f"metadata/{_FC1}.column_mask", 255), f"{_FC1}.column_mask"),
    Lie("NaN in a sparse weight", _number(f"master/{_FC1}.values", _NAN), f"NaN or infinity in master {_FC1}.values"),
    Lie("infinity in a sparse weight", _number(f"master/{_FC1}.values", _INFINITY, 1), "NaN or infinity in master"),
    Lie("NaN in a first moment", _number(f"exp_avg/{_FC1}.values", _NAN, 1), "NaN or infinity in exp_avg"),
    Lie("NaN in a second moment", _number(f"exp_avg_sq/{_FC1}.values", _NAN), "NaN or infinity in exp_avg_sq"),
    Lie("a negative second moment", _number(f"exp_avg_sq/{_FC1}.values", -1.0), "negative mean of squares"),
    Lie("NaN in an adapter", _number("master/decoder.layers.0.fc1.adapter.up", _NAN), "NaN or infinity in master"),
    Lie("NaN in the embedding", _number("master/decoder.embed_tokens.weight", _NAN, 1), "NaN or infinity in master"),
    Lie("no first moment of a weight", _renamed(f"exp_avg/{_FC1}.values"), f"lacks exp_avg {_FC1}.values"),
    Lie("no metadata of a weight", _renamed(_INDICES), f"lacks metadata {_FC1}.indices"),
    Lie(
        "a weight of another shape",
        _swapped_names(f"master/{_FC1}.values", "master/decoder.layers.0.self_attn.out_proj.weight.values"),
        "weight.values",
    ),
    Lie("no scalars", lambda folder: reseal(folder, lambda content: content.update(scalars={})), NEWEST),
    Lie("adapters that are neither on nor off", _scalars(adapters="perhaps"), NEWEST),
    Lie("step counters in words", _scalars(optimizer_steps={"decay": "six", "no_decay": 6, "adapters": 3}), NEWEST),
    Lie("no step counters", _scalars(optimizer_steps=None), NEWEST),
    Lie("step counters below zero", _scalars(optimizer_steps={"decay": -6, "no_decay": 6, "adapters": 3}), NEWEST),
    Lie("skipped steps in words", _scalars(skipped_steps="none"), NEWEST),
    Lie("an empty identity", _content(identity={}), "is of another run"),
    Lie("half a character in the identity", _content(identity={"model": "\ud800"}), "is of another run"),
    Lie("no config", _content(config={}), NEWEST),
]
