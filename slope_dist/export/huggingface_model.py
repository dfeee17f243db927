"""A model of Hugging Face's transformers, ours or a published one, read as a model at rest: all linear layers dense.

Shape letters: O out, I in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from slope_dist.checkpoint.reader import sha256_of
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export.huggingface import STEM, identity_of
from slope_dist.export.huggingface_config import model_of
from slope_dist.export.huggingface_names import OLD_PREFIXES, FileTensor, file_tensors
from slope_dist.export.json_files import CONFIG, read_json
from slope_dist.export.peft_adapter import ADAPTER_FOLDER
from slope_dist.export.peft_reader import AdapterReader
from slope_dist.export.stored import LinearForm, Origin, StoredModel, row_blocks
from slope_dist.export.tensor_reader import TensorReader
from slope_dist.export.tokenizer_files import tokenizer_in
from slope_dist.output import visible
from slope_dist.sparse import Pattern
from slope_dist.transfer import Transfer

_ONE_FILE = f"{STEM}.safetensors"
_INDEX = f"{_ONE_FILE}.index.json"
_HEAD = "lm_head.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Masks and angles that older versions of transformers saved, and a version number of those that came before.
_BUFFERS = re.compile(
    r"(transformer\.)?h\.[0-9]+\.attn\.(bias|masked_bias)|(model\.)?decoder\.version"
    r"|model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq"
)


class HuggingFaceModel(StoredModel):
    """The model of a folder that transformers loads, and of PEFT's adapter in the folder `adapter` there."""

    def __init__(self, path: Path, tokenizer: Path | None = None, transfer: Transfer | None = None) -> None:
        """Open the folder and read all headers.

        Args:
            path: the folder.
            tokenizer: of the model; None: the one in the folder.
            transfer: told of the bytes that are hashed, where an adapter says which weights it was trained with.

        Raises:
            UserError: if our model cannot compute it, or its files are not what its config.json says.
        """
        content = read_json(path / CONFIG)
        self._end = content.get("eos_token_id")
        self.model = model_of(content, path / CONFIG)
        self.origin = Origin(path, "hf")
        self._path = path
        self._tokenizer_path = tokenizer
        self._transfer = transfer or Transfer()
        self._reader = _opened(path)
        blocks, found = self.model.num_layers, len(self._reader.entries)
        if found < blocks:
            # Before the model's shapes are made, which takes a while for so many.
            raise UserError(f"{path}: expected tensors of {blocks} blocks, as {CONFIG} says, found {found} tensors")
        self._tensors = self._named()
        self.dtype = self._check()
        self._places: dict[str, tuple[FileTensor, range]] = {}
        for tensor in self._tensors:
            first = 0
            for part, rows in tensor.parts.items():
                self._places[part] = (tensor, range(first, first + rows))
                first += rows
        self._adapter = self._adapter_reader()
        ranks = {} if self._adapter is None else self._adapter.ranks
        self.linears = {
            name: LinearForm(shape, self._pattern(name), ranks.get(name, 0), bias=bias)
            for name, (shape, bias) in self.skeleton.linears.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`."""
        layer, _, factor = name.rpartition(".adapter.")
        if layer:
            assert self._adapter is not None
            read = self._adapter.down if factor == "down" else self._adapter.up
            return read(layer, self.dtype, start, stop)
        tensor, rows = self._places[name]
        rows = rows[start:stop]
        if not tensor.transposed:
            return self._reader.read(tensor.name, rows.start, rows.stop)
        return self._reader.read(tensor.name, columns=(rows.start, rows.stop)).T.contiguous()

    def tokenizer(self) -> Tokenizer:
        """The one that was given, or that of the folder; its end of a document must be that of the config."""
        where = self._tokenizer_path or self._path
        if self._tokenizer_path is not None:
            found = load_tokenizer(where)
        else:
            try:
                found = tokenizer_in(where)
            except UserError as error:
                raise UserError(f"{error}; or name the tokenizer with --tokenizer PATH") from error
        if found.vocab_size > self.model.vocab_size:
            raise UserError(
                f"{where} is not the tokenizer of {self._path}: it has {found.vocab_size} ids, and the model "
                f"{self.model.vocab_size}"
            )
        ends = self._end if isinstance(self._end, list) else [self._end]
        if self._end is not None and found.end_of_document not in ends:
            raise UserError(
                f"{where} is not the tokenizer of {self._path}: it ends a document with id {found.end_of_document}, "
                f"and the eos_token_id of {CONFIG} is {visible(str(self._end))[:60]}"
            )
        return found

    def _named(self) -> list[FileTensor]:
        """The tensors of the files, by the names that they have here."""
        tensors = file_tensors(self.model.family, self.skeleton)
        prefix = OLD_PREFIXES.get(self.model.family)
        if prefix is None or any(name.startswith(prefix) for name in self._reader.entries):
            return tensors
        return [replace(tensor, name=tensor.name.removeprefix(prefix)) for tensor in tensors]

    def _beside(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What the files hold beside the tensors that `_named` gives: dtype and shape by name."""
        return {}

    def _apart(self) -> Collection[str]:
        """Layers that are modules of their own in the files, whatever transformers has."""
        return ()

    def _pattern(self, layer: str) -> Pattern | None:
        """How the weight of a linear layer is stored."""
        return None

    def _check(self) -> torch.dtype:
        """The dtype of the weights.

        Raises:
            UserError: if the tensors are not those of the model.
        """
        # The first layer's first, of tokens.
        entries, table = self._reader.entries, self._tensors[0].name
        dtype = entries[table].dtype if table in entries else torch.float32
        if dtype not in _DTYPES:
            raise UserError(f"{self._reader.place(table)}: {table}: expected F32, BF16 or F16, found {entries[table]}")
        expected = {tensor.name: (dtype, tensor.shape) for tensor in self._tensors} | self._beside(dtype)
        copied = self.model.has_tied_head and _HEAD in entries
        if copied:
            expected[_HEAD] = expected[table]
        self._reader.expect(expected)
        if copied:
            for start, stop in row_blocks(expected[table][1], dtype.itemsize):
                if not torch.equal(self._reader.read(_HEAD, start, stop), self._reader.read(table, start, stop)):
                    raise UserError(
                        f"{self._reader.place(_HEAD)}: {_HEAD}: expected the numbers of {table}, to which the config "
                        "ties it, found others"
                    )
        return dtype

    def _adapter_reader(self) -> AdapterReader | None:
        folder = self._path / ADAPTER_FOLDER
        if not os.path.lexists(folder):
            return None
        shapes = {name: shape for name, (shape, _) in self.skeleton.linears.items()}
        return AdapterReader(folder, self.model.family, shapes, cache(self._identity), self._apart())

    def _identity(self) -> str:
        """Of the weights, for an adapter that names those it belongs to."""
        paths = [self._path / name for name in self._reader.files]
        self._transfer.begin(sum(path.stat().st_size for path in paths))
        return identity_of({path.name: sha256_of(path, self._transfer) for path in paths})


def _opened(path: Path) -> TensorReader:
    """The weights of a folder: in one file, or several with an index.

    Raises:
        UserError: if there are none, or the index does not tell what the files hold.
    """
    if os.path.lexists(path / _ONE_FILE):
        return TensorReader(path, [_ONE_FILE], _BUFFERS)
    if not os.path.lexists(path / _INDEX):
        raise UserError(
            f"{path} holds no weights: expected {_ONE_FILE} or {_INDEX}; weights in other files, such as "
            "pytorch_model.bin, have to be saved as safetensors first"
        )
    files = read_json(path / _INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path / _INDEX}: weight_map: expected an object of file names")
    reader = TensorReader(path, sorted(set(files.values())), _BUFFERS)
    for name in sorted(files.keys() | reader.entries.keys()):
        entry = reader.entries.get(name)
        if (entry.file if entry else None) != files.get(name) and not _BUFFERS.fullmatch(name):
            told, found = (visible(str(file))[:100] for file in (files.get(name), entry.file if entry else None))
            raise UserError(f"{path / _INDEX}: {visible(name)[:100]}: expected in {told}, found in {found}")
    return reader
