"""A PEFT LoRA adapter of Hugging Face's form, ours or another, read as the adapters of our layers.

Shape letters: O out, I in, R adapter rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export.huggingface_config import Keys
from slope_dist.export.huggingface_names import modules_of
from slope_dist.export.json_files import read_json
from slope_dist.export.peft_adapter import ADAPTER_CONFIG, ADAPTER_FILE, BASE_KEY, KEY_PREFIX, RANKS_KEY, scaled
from slope_dist.export.stored import PROJECTIONS
from slope_dist.export.tensor_files import cast
from slope_dist.export.tensor_reader import TensorReader
from slope_dist.output import visible

_KEY = re.compile(rf"{re.escape(KEY_PREFIX)}(.+)\.lora_([AB])\.weight")

# What changes the function of an adapter, and what ours is.
_FIXED: dict[str, list[object]] = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "alora_invocation_tokens": [None],
    "arrow_config": [None],
    "exclude_modules": [None],
    # Others change the weights of the base when PEFT makes the adapter, each time that it is loaded too.
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"],
    "kasa_config": [None],
    "layer_replication": [None],
    "layers_to_transform": [None],
    "lora_bias": [False],
    "modules_to_save": [None, []],
    "monteclora_config": [None],
    "target_parameters": [None],
    "trainable_token_indices": [None],
    "use_bdlora": [None, False],
    "use_dora": [False],
    "use_qalora": [False],
}


@dataclass(frozen=True)
class _Place:
    """Where the adapter of one of our layers lies.

    Attributes:
        module: of transformers.
        rows: [start, stop) along O of lora_B.
        rank: R.
        first: of its R rows of lora_A, and columns of lora_B.
        factor: of lora_B, so that it is divided by R in use.
    """

    module: str
    rows: tuple[int, int]
    rank: int
    first: int
    factor: Fraction


class AdapterReader:
    """The adapters of a folder.

    Attributes:
        ranks: R of each of our layers that has one, by name.
    """

    def __init__(
        self,
        folder: Path,
        family: str,
        linears: Mapping[str, tuple[int, int]],
        base: Callable[[], str],
        apart: Collection[str] = (),
    ) -> None:
        """Open and check them.

        Args:
            folder: that holds adapter_config.json.
            family: of the base.
            linears: our linear layers of the base, [O, I] by name.
            base: makes the identity of the base's weights, where the adapter names one.
            apart: layers that are modules of their own; see `modules_of`.

        Raises:
            UserError: if the adapter does something that ours do not, or belongs to another base.
        """
        self._folder = folder
        self._reader = TensorReader(folder, [ADAPTER_FILE])
        self._path = folder / ADAPTER_FILE
        metadata = self._reader.metadata(ADAPTER_FILE)
        if BASE_KEY in metadata and metadata[BASE_KEY] != base():
            raise UserError(
                f"{self._path} is an adapter of another base: expected weights with identity "
                f"{visible(metadata[BASE_KEY])[:12]}..., found {base()[:12]}... in {folder.parent}"
            )
        self._modules = modules_of(family, (name for name in linears if name not in PROJECTIONS), apart)
        self._linears = linears
        shapes = self._shapes()
        config = Keys(read_json(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
        for key, allowed in _FIXED.items():
            config.one_of(key, allowed, allowed[0])
        self._check_targets(config, set(shapes))
        self._places = self._placed(shapes, config, self._own_ranks(metadata))
        self.ranks = {layer: place.rank for layer, place in self._places.items()}

    def down(self, layer: str, dtype: torch.dtype, start: int, stop: int | None) -> Tensor:
        """Rows of the first factor: [R, I] of all."""
        place = self._places[layer]
        rows = range(place.first, place.first + place.rank)[start:stop]
        found = self._reader.read(_name(place.module, "A"), rows.start, rows.stop)
        return cast(found, dtype, f"{self._path}: {layer}")

    def up(self, layer: str, dtype: torch.dtype, start: int, stop: int | None) -> Tensor:
        """Rows of the second factor, which is divided by R in use: [O, R] of all."""
        place = self._places[layer]
        rows = range(*place.rows)[start:stop]
        found = self._reader.read(_name(place.module, "B"), rows.start, rows.stop)
        columns = slice(place.first, place.first + place.rank)
        if found[:, : columns.start].any() or found[:, columns.stop :].any():
            raise UserError(
                f"{self._path}: {_name(place.module, 'B')}: expected zeros beside the adapter of {layer}, found others"
            )
        return cast(scaled(found[:, columns].contiguous(), place.factor), dtype, f"{self._path}: {layer}")

    def _shapes(self) -> dict[str, int]:
        """Rank of each module's adapter, whose factors fit the module."""
        ranks: dict[str, int] = {}
        for key, entry in self._reader.entries.items():
            match = _KEY.fullmatch(key)
            layers = self._modules.get(match[1]) if match else None
            if match is None or layers is None:
                raise UserError(f"{self._path}: {visible(key)[:100]}: the base has no such linear layer in its blocks")
            other = self._reader.entries.get(_name(match[1], "AB".replace(match[2], "")))
            rows, columns = sum(self._linears[layer][0] for layer in layers), self._linears[layers[0]][1]
            if other is None or len(entry.shape) != 2:
                raise UserError(f"{self._path}: {key}: expected two factors [r, {columns}] and [{rows}, r]")
            rank = entry.shape[0 if match[2] == "A" else 1]
            expected = (rank, columns) if match[2] == "A" else (rows, rank)
            if entry.shape != expected or ranks.setdefault(match[1], rank) != rank or not rank:
                raise UserError(
                    f"{self._path}: {key}: expected factors [r, {columns}] and [{rows}, r] for this base, found {entry}"
                )
            if not entry.dtype.is_floating_point:
                raise UserError(f"{self._path}: {key}: expected floating point, found {entry}")
        if not ranks:
            raise UserError(f"{self._path} holds no adapter")
        return ranks

    def _check_targets(self, config: Keys, found: set[str]) -> None:
        """The modules that the config names have adapters, and no others; what it names by a pattern is believed."""
        targets = config.strings("target_modules")
        if targets is None:
            return
        named = {module for module in self._modules for target in targets if _names(target, module)}
        idle = next((target for target in targets if not any(_names(target, module) for module in named)), None)
        if idle is not None:
            raise config.refuse("target_modules", f"the base has no linear layer {visible(idle)[:60]}")
        for module in sorted(named ^ found):
            what = "is not among the target_modules" if module in found else "has no adapter, and is a target module"
            raise UserError(f"{self._path}: {module} {what} of {ADAPTER_CONFIG}")

    def _check_names(self, config: Keys, key: str) -> None:
        """An object of numbers names modules; it may hold regular expressions too, which are not followed here."""
        numbers = config.within(key)
        for name in [] if numbers is None else numbers.names:
            if not any(_names(name, module) for module in self._modules):
                raise UserError(
                    f"{self._folder / ADAPTER_CONFIG}: {key}: expected names of linear layers of the base, found "
                    f"{visible(name)[:60]}; write out the layers that a pattern means"
                )

    def _own_ranks(self, metadata: Mapping[str, str]) -> dict[str, int] | None:
        """What an adapter of ours says of our layers."""
        if RANKS_KEY not in metadata:
            return None
        try:
            ranks = json.loads(metadata[RANKS_KEY])
        except (ValueError, RecursionError):
            ranks = None
        layers = {layer for module in self._modules.values() for layer in module}
        if not isinstance(ranks, dict) or not all(
            layer in layers and type(rank) is int and rank > 0 for layer, rank in ranks.items()
        ):
            raise UserError(f"{self._path}: header: {RANKS_KEY}: expected ranks of linear layers of the base")
        return ranks

    def _placed(self, shapes: Mapping[str, int], config: Keys, own: dict[str, int] | None) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        root = config.one_of("use_rslora", [False, True], False)
        for key in ("rank_pattern", "alpha_pattern"):
            self._check_names(config, key)
        for module, rank in shapes.items():
            said = _of_module(config, "rank_pattern", module, config.number("r"))
            if said != rank:
                raise UserError(f"{self._path}: {module}: {ADAPTER_CONFIG} says rank {said:g}, found rank {rank}")
            alpha = _of_module(config, "alpha_pattern", module, config.number("lora_alpha"))
            scaling = Fraction(alpha) / (Fraction(sqrt(rank)) if root else rank)
            row = first = 0
            for layer in self._modules[module]:
                rows = (row, row + self._linears[layer][0])
                part = rank if own is None else own.get(layer, 0)
                if part:
                    places[layer] = _Place(module, rows, part, first, scaling * part)
                elif self._reader.read(_name(module, "B"), *rows).any():
                    raise UserError(f"{self._path}: header: {RANKS_KEY}: {layer} has an adapter that they do not name")
                row = rows[1]
                first += 0 if own is None else part
            if first > rank:
                raise UserError(f"{self._path}: {module}: the header's {RANKS_KEY} do not fit rank {rank}")
        if own is not None and own.keys() != places.keys():
            raise UserError(f"{self._path}: header: {RANKS_KEY} name layers that have no adapter")
        return places


def _of_module(config: Keys, key: str, module: str, default: float) -> float:
    """The number that an object of numbers has for a module: that of the first name that means it, as PEFT has it."""
    numbers = config.within(key)
    name = None if numbers is None else next((name for name in numbers.names if _names(name, module)), None)
    return default if numbers is None or name is None else numbers.number(name)


def _name(module: str, factor: str) -> str:
    return f"{KEY_PREFIX}{module}.lora_{factor}.weight"


def _names(target: str, module: str) -> bool:
    """Whether a name in PEFT's lists means the module: itself, or its last parts."""
    return module == target or module.endswith(f".{target}")
