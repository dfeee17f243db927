"""The layout of compressed-tensors' sparse-24-bitmask: kept entries and one bit an element; the rest as in form "hf".

docs/inference-formats.md says it for strangers.

Shape letters: O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export.dense_rows import rows_of
from slope_dist.export.huggingface import HuggingFaceExport
from slope_dist.export.huggingface_config import Keys
from slope_dist.export.huggingface_model import HuggingFaceModel
from slope_dist.export.huggingface_names import FileTensor, file_tensors, module_of
from slope_dist.export.json_files import CONFIG, read_json
from slope_dist.export.options import Options
from slope_dist.export.peft_adapter import AdapterExport
from slope_dist.export.stored import Origin, Skeleton, StoredModel, nothing_sparse, row_blocks
from slope_dist.export.tensor_files import SHARD_BYTES, Planned, cast
from slope_dist.sparse import Pattern, codec
from slope_dist.transfer import Transfer

METHOD, FORMAT = "compressed-tensors", "sparse-24-bitmask"
TWO_FOUR = Pattern(2, 4)
_WEIGHT = ".weight.values"


@dataclass(frozen=True)
class CompressedWeight:
    """A 2:4 weight in the files: three tensors whose names begin with that of a module.

    `shape` is int64 [2], the numbers O and I; `compressed` [O, I / 2] the kept entries; `bitmask` uint8 [O, I / 8], in
    which entry c is bit c % 8 of byte c // 8.

    Attributes:
        layer: our name.
        module: transformers' name; ours where several of our layers are one module there.
        shape: [O, I].
    """

    layer: str
    module: str
    shape: tuple[int, int]

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of shape, kept entries and bits."""
        return f"{self.module}.shape", f"{self.module}.compressed", f"{self.module}.bitmask"


def weights_in_files(
    family: str, skeleton: Skeleton, is_two_four: Callable[[CompressedWeight], bool]
) -> list[FileTensor | CompressedWeight]:
    """What the files hold: where a weight of a module is 2:4, all its weights come one by one, [O, I] in any family.

    Args:
        family: of the model.
        skeleton: its tensors.
        is_two_four: whether a weight, which could be compressed, is.
    """
    found: list[FileTensor | CompressedWeight] = []
    for tensor in file_tensors(family, skeleton):
        layers = [part.removesuffix(_WEIGHT) for part in tensor.parts if part.endswith(_WEIGHT)]
        weights = [
            CompressedWeight(layer, module_of(family, layer) if len(layers) == 1 else layer, skeleton.linears[layer][0])
            for layer in layers
        ]
        compressed = [is_two_four(weight) for weight in weights]
        if not any(compressed):
            found.append(tensor)
            continue
        for weight, is_compressed in zip(weights, compressed, strict=True):
            dense = FileTensor(f"{weight.module}.weight", weight.shape, {f"{weight.layer}{_WEIGHT}": weight.shape[0]})
            found.append(weight if is_compressed else dense)
    return found


def layers_apart(weights: Iterable[FileTensor | CompressedWeight]) -> set[str]:
    """Layers whose weights have our names in the files, whatever module of transformers they belong to."""
    found = set()
    for weight in weights:
        if isinstance(weight, CompressedWeight):
            modules = {weight.layer: weight.module}
        else:
            layers = [part.removesuffix(_WEIGHT) for part in weight.parts if part.endswith(_WEIGHT)]
            modules = dict.fromkeys(layers, weight.name.removesuffix(".weight"))
        found |= {layer for layer, module in modules.items() if layer == module}
    return found


class CompressedExport(HuggingFaceExport):
    """A model about to be written with its 2:4 weights compressed; see `Export`."""

    def __init__(self, stored: StoredModel, options: Options, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Plan, and refuse what cannot be; see `HuggingFaceExport`."""
        super().__init__(stored, options, shard_bytes=shard_bytes)
        others = [form.pattern for form in stored.linears.values() if form.pattern not in (None, TWO_FOUR)]
        if others:
            self._lines.append(
                f"{len(others)} linear layers of pattern {', '.join(sorted(set(map(str, others))))} are stored dense, "
                "with explicit zeros: the format is for 2:4 alone"
            )
        self._lines += nothing_sparse(stored)
        if any(form.pattern == TWO_FOUR for form in stored.linears.values()):
            self._lines.append(
                "transformers and vLLM read this form no more, and transformers goes on with random numbers for its "
                "weights: read it with slope_dist, or convert to hf for them"
            )

    def _config(self, stored: StoredModel, dtype: torch.dtype, ids: dict[str, int | None]) -> dict[str, object]:
        return super()._config(stored, dtype, ids) | {"quantization_config": quantization_config(stored)}

    def _planned(self, stored: StoredModel, dtype: torch.dtype, merged: bool) -> list[Planned]:
        planned = []
        for tensor in _weights_of(stored):
            if isinstance(tensor, FileTensor):
                rows = partial(rows_of, stored, tensor, dtype, merged=merged)
                planned.append(Planned(tensor.name, tensor.shape, dtype, rows))
            else:
                planned += _planned_parts(stored, tensor, dtype)
        return planned

    def _apart(self, stored: StoredModel) -> Collection[str]:
        return layers_apart(_weights_of(stored))

    def _about_adapters(self, adapter: AdapterExport) -> list[str]:
        # It speaks of serving them, which needs the form "hf".
        return []


def quantization_config(stored: StoredModel) -> dict[str, object]:
    """What config.json says of a model with compressed 2:4 weights."""
    tensors = _weights_of(stored)
    compressed = [weight for weight in tensors if isinstance(weight, CompressedWeight)]
    skeleton = stored.skeleton
    dense = [
        tensor.name.removesuffix(".weight")
        for tensor in tensors
        if isinstance(tensor, FileTensor) and any(part.endswith(_WEIGHT) for part in tensor.parts)
    ]
    biases = sum(shape[0] for shape, bias in skeleton.linears.values() if bias)
    weights = sum(prod(shape) for shape, _ in skeleton.linears.values())
    total = weights + biases + sum(prod(shape) for shape in skeleton.others.values())
    pruned = sum(prod(weight.shape) // 2 for weight in compressed)
    return {
        "config_groups": {},
        "format": "dense",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {
            "format": FORMAT,
            "global_sparsity": pruned / total,
            "ignore": [*dense, "lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": [weight.module for weight in compressed],
        },
    }


def _weights_of(stored: StoredModel) -> list[FileTensor | CompressedWeight]:
    return weights_in_files(
        stored.model.family, stored.skeleton, lambda weight: stored.linears[weight.layer].pattern == TWO_FOUR
    )


def _planned_parts(stored: StoredModel, weight: CompressedWeight, dtype: torch.dtype) -> list[Planned]:
    (rows, columns), (shape, compressed, bitmask) = weight.shape, weight.names

    def blocks(part: str) -> Iterator[Tensor]:
        # As many rows as of the whole matrix in fp32: of a byte of metadata eight bits come about, and four columns.
        for start, stop in row_blocks(weight.shape, torch.float32.itemsize):
            yield stored.read(f"{weight.layer}.weight.{part}", start, stop)

    def entries() -> Iterator[Tensor]:
        return (cast(block, dtype, compressed) for block in blocks("values"))

    def bits() -> Iterator[Tensor]:
        return (codec.pack_bits(codec.mask_of(block, TWO_FOUR)) for block in blocks("indices"))

    return [
        Planned.of(shape, torch.tensor(weight.shape)),
        Planned(compressed, (rows, columns // 2), dtype, entries),
        Planned(bitmask, (rows, columns // 8), torch.uint8, bits),
    ]


class CompressedModel(HuggingFaceModel):
    """The model of a folder in this layout, and the adapter in the folder `adapter` there.

    There are no hashes of the weights, unless an adapter has that of those it belongs to.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None, transfer: Transfer | None = None) -> None:
        """Open the folder and read all headers; see `HuggingFaceModel`.

        Raises:
            UserError: also if it is a quantized model, or sparse in another layout.
        """
        keys = Keys(read_json(path / CONFIG), path / CONFIG).within("quantization_config")
        if keys is not None:
            keys.one_of("quant_method", [METHOD])
            keys.one_of("config_groups", [{}, None])
            keys.one_of("kv_cache_scheme", [None])
            keys = keys.within("sparsity_config")
        if keys is None:
            raise UserError(f"{path / CONFIG}: quantization_config: expected a sparsity_config of {FORMAT}, found none")
        keys.one_of("format", [FORMAT])
        super().__init__(path, tokenizer, transfer)
        self.origin = Origin(path, "compressed")
        for weight in self._compressed.values():
            name = weight.names[0]
            found = self._reader.read(name).flatten().tolist()
            if found != list(weight.shape):
                raise UserError(
                    f"{self._reader.place(name)}: {name}: expected {list(weight.shape)} of the config's model, "
                    f"found {found}"
                )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`."""
        layer, _, part = name.rpartition(".weight.")
        weight = self._compressed.get(layer)
        if weight is None:
            return super().read(name, start, stop)
        _, compressed, bitmask = weight.names
        if part == "values":
            return self._reader.read(compressed, start, stop)
        try:
            return codec.pack(codec.unpack_bits(self._reader.read(bitmask, start, stop)), TWO_FOUR)
        except ValueError as error:
            raise UserError(f"{self._reader.place(bitmask)}: {bitmask}: {error}") from error

    def _named(self) -> list[FileTensor]:
        entries = self._reader.entries
        weights = weights_in_files(
            self.model.family, self.skeleton, lambda weight: any(name in entries for name in weight.names)
        )
        self._compressed = {weight.layer: weight for weight in weights if isinstance(weight, CompressedWeight)}
        return [tensor for tensor in weights if isinstance(tensor, FileTensor)]

    def _beside(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for weight in self._compressed.values():
            (rows, columns), (shape, compressed, bitmask) = weight.shape, weight.names
            found = self._reader.entries.get(shape)
            # Versions of compressed-tensors differ in which of the two they write.
            expected[shape] = (torch.int64, (2, 1) if found is not None and found.shape == (2, 1) else (2,))
            expected[compressed] = (dtype, (rows, columns // 2))
            expected[bitmask] = (torch.uint8, (rows, -(-columns // 8)))
        return expected

    def _apart(self) -> Collection[str]:
        return layers_apart([*self._compressed.values(), *self._tensors])

    def _pattern(self, layer: str) -> Pattern | None:
        return TWO_FOUR if layer in self._compressed else None
