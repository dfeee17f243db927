"""The form of Hugging Face's transformers: pruned weights dense with explicit zeros, adapters beside them for PEFT.

Such a folder also loads where transformers' models do, in vLLM say, at the speed of a dense model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import torch

from slope_dist.checkpoint.retention import sync_folder
from slope_dist.export.dense_rows import rows_of
from slope_dist.export.huggingface_config import config_json
from slope_dist.export.huggingface_names import file_tensors
from slope_dist.export.json_files import CONFIG
from slope_dist.export.options import Options
from slope_dist.export.peft_adapter import ADAPTER_FOLDER, AdapterExport
from slope_dist.export.stored import StoredModel
from slope_dist.export.target import write_file
from slope_dist.export.tensor_files import SHARD_BYTES, Planned, header_bytes, total_bytes, write_shards
from slope_dist.export.tokenizer_files import hugging_face_files, lines_about, special_ids
from slope_dist.transfer import Transfer

STEM = "model"
"""How the names of the files of weights begin."""

_NO_IDS: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class HuggingFaceExport:
    """A model about to be written for transformers; see `Export`."""

    def __init__(self, stored: StoredModel, options: Options, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Plan, and refuse what cannot be.

        Args:
            stored: the model.
            options: how.
            shard_bytes: most bytes of weights in a file.

        Raises:
            UserError: if transformers cannot compute the model, its tokenizer is not there, or options contradict.
        """
        self._shard_bytes = shard_bytes
        self._lines: list[str] = []
        dtype = options.dtype or stored.dtype
        ids, tokenizer_files = self._tokenizer(stored, options)
        self._files = {
            CONFIG: _json(self._config(stored, dtype, ids)),
            "generation_config.json": _json(ids),
            **tokenizer_files,
        }
        merged = options.merge_adapters
        self._weights = self._planned(stored, dtype, merged)
        self.bytes = total_bytes(self._weights) + header_bytes(self._weights) + sum(map(len, self._files.values()))
        self._adapter: AdapterExport | None = None
        if not stored.has_adapters:
            if merged or options.pad_adapters:
                self._lines.append("the model has no adapters, so there was nothing to do to them")
        elif merged:
            self._lines.append(_gone(stored))
        else:
            self._adapter = AdapterExport(stored, dtype, pad=options.pad_adapters, apart=self._apart(stored))
            self.bytes += self._adapter.bytes
            self._lines += self._about_adapters(self._adapter)

    def write(self, folder: Path, transfer: Transfer) -> list[str]:
        """See `Export`."""
        transfer.begin(self.bytes)
        hashes = write_shards(folder, STEM, self._weights, transfer, shard_bytes=self._shard_bytes)
        for name, data in self._files.items():
            write_file(folder / name, data)
            transfer.add(len(data))
        if self._adapter is not None:
            inner = folder / ADAPTER_FOLDER
            inner.mkdir()
            self._adapter.write(inner, transfer, identity_of(hashes))
            sync_folder(inner)
        return list(self._lines)

    def _config(self, stored: StoredModel, dtype: torch.dtype, ids: dict[str, int | None]) -> dict[str, object]:
        """The content of config.json."""
        return config_json(stored.model, dtype, ids)

    def _planned(self, stored: StoredModel, dtype: torch.dtype, merged: bool) -> list[Planned]:
        """The tensors of the files of weights."""
        return [
            Planned(tensor.name, tensor.shape, dtype, partial(rows_of, stored, tensor, dtype, merged=merged))
            for tensor in file_tensors(stored.model.family, stored.skeleton)
        ]

    def _apart(self, stored: StoredModel) -> Collection[str]:
        """Layers that are modules of their own in the files, whatever transformers has."""
        return ()

    def _about_adapters(self, adapter: AdapterExport) -> list[str]:
        """What the user should know of the adapters beside the weights."""
        return [adapter.line]

    def _tokenizer(self, stored: StoredModel, options: Options) -> tuple[dict[str, int | None], dict[str, bytes]]:
        """Ids of special tokens, and the tokenizer's files."""
        if not options.tokenizer:
            self._lines.append("without the tokenizer no end of a text is known: eos_token_id is null in config.json")
            return _NO_IDS, {}
        tokenizer = stored.tokenizer()
        files = hugging_face_files(tokenizer, stored.model)
        self._lines += lines_about(files)
        return special_ids(tokenizer), files


def identity_of(hashes: Mapping[str, str]) -> str:
    """SHA-256 over the SHA-256 of all files of weights, by name, in hex: which weights an adapter was trained with."""
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def _gone(stored: StoredModel) -> str:
    layers = [form for form in stored.linears.values() if form.adapter_rank and form.pattern is not None]
    return f"{len(layers)} linear layers have their adapters added in and are dense now: their sparsity is gone"


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
