"""Low-rank adapters as PEFT writes LoRA: adapter_config.json and adapter_model.safetensors.

PEFT adds lora_B(lora_A(x)) lora_alpha / r. Ours is up(down(x)) / R, so lora_alpha is 1 where r is R. Where one module
of transformers holds several of our layers (GPT-2's c_attn), their adapters become one: the rows of lora_A are theirs
one after another, and lora_B is block-diagonal.

Shape letters: O out, I in, R adapter rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export.huggingface_names import modules_of
from slope_dist.export.stored import StoredModel, row_blocks
from slope_dist.export.target import write_file
from slope_dist.export.tensor_files import Planned, cast, header_bytes, total_bytes, write_file_of_tensors
from slope_dist.transfer import Transfer

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
BASE_KEY, RANKS_KEY = "base_sha256", "ranks"
"""In the header of `ADAPTER_FILE`: the identity of the base's weights; the rank of each of our layers, as JSON."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""


@dataclass(frozen=True)
class _Module:
    """The adapter of one module of transformers.

    Attributes:
        ranks: R of our layers that the module holds, by name, along O; 0 where a layer has no adapter.
        shape: [O, I] of the module.
        rank: of its adapter; what is above the sum of `ranks` is zero.
        alpha: PEFT's lora_alpha.
    """

    ranks: dict[str, int]
    shape: tuple[int, int]
    rank: int
    alpha: int

    def factor(self, layer: str) -> Fraction:
        """What lora_B has the entries of the layer's second factor multiplied by."""
        return Fraction(self.rank, self.alpha * self.ranks[layer])


class AdapterExport:
    """The adapters of a model about to be written.

    Attributes:
        bytes: about what they take on the disk.
        line: what the user should know.
    """

    def __init__(self, stored: StoredModel, dtype: torch.dtype, *, pad: bool, apart: Collection[str] = ()) -> None:
        """Plan.

        Args:
            stored: a model that has adapters.
            dtype: of the factors.
            pad: zero rows and columns up to the next rank that vLLM accepts, the same for all modules.
            apart: layers that are modules of their own; see `modules_of`.

        Raises:
            UserError: if it accepts none that is large enough.
        """
        self._stored = stored
        self._dtype = dtype
        self._modules = _modules(stored, pad, apart)
        self._tensors = [tensor for module in self._modules.items() for tensor in self._planned(*module)]
        self._config = _config(self._modules, stored.model.family)
        self.line = _about({module.rank for module in self._modules.values()}, stored.model.family, pad)
        described = sum(map(len, self._metadata("0" * 64).values())) + len(self._config)
        self.bytes = total_bytes(self._tensors) + header_bytes(self._tensors) + described

    def write(self, folder: Path, transfer: Transfer, base: str) -> None:
        """Write into an empty folder; `base` is the identity of the weights that they belong to."""
        write_file_of_tensors(folder / ADAPTER_FILE, self._tensors, transfer, metadata=self._metadata(base))
        write_file(folder / ADAPTER_CONFIG, self._config)
        transfer.add(len(self._config))

    def _metadata(self, base: str) -> dict[str, str]:
        ranks = {name: form.adapter_rank for name, form in self._stored.linears.items() if form.adapter_rank}
        return {BASE_KEY: base, RANKS_KEY: json.dumps(ranks, separators=(",", ":"))}

    def _planned(self, name: str, module: _Module) -> list[Planned]:
        first, second = (f"{KEY_PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
        rows, columns = module.shape
        return [
            Planned(first, (module.rank, columns), self._dtype, partial(self._first_factor, first, module)),
            Planned(second, (rows, module.rank), self._dtype, partial(self._second_factor, second, module)),
        ]

    def _first_factor(self, name: str, module: _Module) -> Iterator[Tensor]:
        """lora_A, [rank, I]: one of our layers after another, then zeros."""
        for layer, rank in module.ranks.items():
            if rank:
                yield cast(self._stored.read(f"{layer}.adapter.down"), self._dtype, name)
        padding = module.rank - sum(module.ranks.values())
        if padding:
            yield torch.zeros(padding, module.shape[1], dtype=self._dtype)

    def _second_factor(self, name: str, module: _Module) -> Iterator[Tensor]:
        """lora_B, [O, rank]: the rows of each of our layers are zero but for the columns of its own adapter."""
        at = 0
        for layer, rank in module.ranks.items():
            shape = (self._stored.linears[layer].shape[0], module.rank)
            for start, stop in row_blocks(shape, torch.float32.itemsize):
                block = torch.zeros(stop - start, module.rank, dtype=self._dtype)
                if rank:
                    up = scaled(self._stored.read(f"{layer}.adapter.up", start, stop), module.factor(layer))
                    block[:, at : at + rank] = cast(up, self._dtype, name)
                yield block
            at += rank


def scaled(factor: Tensor, by: Fraction) -> Tensor:
    """A factor of an adapter times a number, in fp32; itself where that is one."""
    return factor if by == 1 else factor.float() * float(by)


def _modules(stored: StoredModel, pad: bool, apart: Collection[str]) -> dict[str, _Module]:
    found = {}
    for name, layers in modules_of(stored.model.family, stored.linears, apart).items():
        forms = [stored.linears[layer] for layer in layers]
        ranks = {layer: form.adapter_rank for layer, form in zip(layers, forms, strict=True)}
        own = [rank for rank in ranks.values() if rank]
        if own:
            # r / lora_alpha is R, where all of a module's layers have the same.
            shape = (sum(form.shape[0] for form in forms), forms[0].shape[1])
            found[name] = _Module(ranks, shape, sum(own), len(own))
    if not pad:
        return found
    most = max(module.rank for module in found.values())
    rank = _accepted(most)
    if rank is None:
        raise UserError(f"adapters of rank {most} cannot be padded: vLLM accepts {VLLM_RANKS[-1]} at most")
    return {name: _Module(module.ranks, module.shape, rank, rank) for name, module in found.items()}


def _accepted(rank: int) -> int | None:
    """The least rank not below `rank` that vLLM accepts."""
    return next((accepted for accepted in VLLM_RANKS if accepted >= rank), None)


def _about(ranks: set[int], family: str, padded: bool) -> str:
    """What vLLM makes of adapters of these ranks."""
    rank = f"the adapters have rank {' and '.join(map(str, sorted(ranks)))}"
    accepted = _accepted(max(ranks))
    if family == "gpt2":
        return f"{rank}; vLLM serves GPT-2 without adapters only: --merge-adapters adds them to the weights"
    if accepted is None:
        return f"{rank}; vLLM accepts {VLLM_RANKS[-1]} at most: --merge-adapters adds them to the weights"
    if not padded and not ranks <= set(VLLM_RANKS):
        return f"{rank}, and vLLM knows {', '.join(map(str, VLLM_RANKS))}: --pad-adapters writes rank {accepted}"
    return f"{rank}; vLLM serves them with --enable-lora --max-lora-rank {accepted}"


def _config(modules: dict[str, _Module], family: str) -> bytes:
    """adapter_config.json."""
    (rank, alpha), _ = Counter((module.rank, module.alpha) for module in modules.values()).most_common(1)[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        # Whole names: the first block has linear layers of the same last name that have no adapter.
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "rank_pattern": {name: module.rank for name, module in modules.items() if module.rank != rank},
        "alpha_pattern": {name: module.alpha for name, module in modules.items() if module.alpha != alpha},
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2).encode() + b"\n"
