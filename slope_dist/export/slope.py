"""The form of our own inference: weights as the kernels read them, adapters' first factors appended where they are 2:4.

docs/inference-formats.md says it for strangers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from slope_dist.checkpoint.format import Count, StoredFile, dtype_name, encode, unseal
from slope_dist.checkpoint.reader import sha256_of
from slope_dist.config.model import ModelConfig
from slope_dist.data.load_tokenizer import FILES as TOKENIZER_FILES
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export.json_files import MAX_JSON_BYTES, SLOPE
from slope_dist.export.options import Options
from slope_dist.export.stored import (
    PROJECTIONS,
    LinearForm,
    Origin,
    StoredModel,
    keeps_two_of_four,
    nothing_sparse,
    row_blocks,
)
from slope_dist.export.target import write_file
from slope_dist.export.tensor_files import KNOWN_DTYPES, Planned, cast, header_bytes, total_bytes, write_shards
from slope_dist.export.tensor_reader import TensorReader, stamp_of
from slope_dist.files import read_bounded
from slope_dist.output import visible
from slope_dist.sparse import CompressedMatrix, Pattern, codec
from slope_dist.transfer import Transfer

FORMAT_VERSION = 1
STEM = "weights"
"""Of the names of the files of tensors."""

_FileName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredLinear(_Strict):
    """How a linear layer lies in the files; see `LinearForm`."""

    pattern: Literal["1:2", "2:4", "2:8", "4:8"] | None
    adapter_rank: Annotated[int, Field(ge=0, le=2**20)]
    appended: bool


class Source(_Strict):
    """What the model was converted from: the form, and the name of its folder."""

    form: str
    name: str


class StoredTokenizer(_Strict):
    """The tokenizer's files, the hash of the one that makes its ids, and the id that ends a document.

    The last is not known of what was written before it was kept.
    """

    files: list[_FileName]
    sha256: _Sha256
    end_of_document: int | None = None


class Description(_Strict):
    """What slope.json holds."""

    format: int
    model: ModelConfig
    dtype: Literal["F32", "BF16", "F16"]
    step: Count | None
    source: Source
    linears: dict[str, StoredLinear]
    files: dict[_FileName, StoredFile]
    tokenizer: StoredTokenizer | None


class SlopeExport:
    """Our own form of a model, about to be written.

    Attributes:
        bytes: most that it takes.
    """

    def __init__(self, stored: StoredModel, options: Options) -> None:
        """Look for the tokenizer.

        Raises:
            UserError: if the tokenizer is wanted and not there.
        """
        self._stored = stored
        self._prune = options.prune_adapters
        self._dtype = options.dtype or stored.dtype
        self._tokenizer = stored.tokenizer() if options.tokenizer else None
        self._files = {} if self._tokenizer is None else self._tokenizer.files()
        # An appended factor takes less than one beside its weight.
        planned = self.planned({name: replace(form, appended=False) for name, form in stored.linears.items()})
        self.bytes = total_bytes(planned) + header_bytes(planned) + sum(map(len, self._files.values()))

    def planned(self, linears: Mapping[str, LinearForm]) -> list[Planned]:
        """The tensors of the files in which linear layers lie so."""
        return [self._planned(name, shape, linears) for name, shape in shapes_in_files(self._stored, linears).items()]

    def write(self, folder: Path, transfer: Transfer) -> list[str]:
        """See `Export`."""
        linears, lines = self._linears_in_files()
        tensors = self.planned(linears)
        transfer.begin(total_bytes(tensors))
        hashes = write_shards(folder, STEM, tensors, transfer)
        for name, data in self._files.items():
            write_file(folder / name, data)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashes.get(path.name) or sha256_of(path, Transfer())}
            for path in sorted(folder.iterdir())
        }
        origin = self._stored.origin
        content: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "model": self._stored.model.model_dump(mode="json"),
            "dtype": dtype_name(self._dtype),
            "step": origin.step,
            "source": {"form": origin.form, "name": origin.path.absolute().name},
            "linears": {
                name: {
                    "pattern": None if form.pattern is None else str(form.pattern),
                    "adapter_rank": form.adapter_rank,
                    "appended": form.appended,
                }
                for name, form in linears.items()
            },
            "files": files,
            "tokenizer": self._tokenizer
            and {
                "files": list(self._files),
                "sha256": self._tokenizer.sha256,
                "end_of_document": self._tokenizer.end_of_document,
            },
        }
        write_file(folder / SLOPE, encode(content))
        return lines

    def _linears_in_files(self) -> tuple[dict[str, LinearForm], list[str]]:
        """How each linear layer will lie in the files, and what the user should know of it."""
        linears = {}
        dense, apart, pruned, removed, total = 0, 0, 0, 0.0, 0.0
        for name, form in self._stored.linears.items():
            appended = form.appended
            if form.adapter_rank and not appended:
                two_four = form.pattern is not None and form.pattern.is_two_four
                down = self._stored.read(f"{name}.adapter.down")
                appended = two_four and keeps_two_of_four(down)
                if two_four and not appended and self._prune:
                    lost = down.double() - self._tail(name).expand().double()
                    removed += float(lost.square().sum())
                    total += float(down.double().square().sum())
                    pruned += 1
                    appended = True
                dense += two_four and not appended
                apart += not two_four
            linears[name] = replace(form, appended=appended)
        lines = nothing_sparse(self._stored)
        if pruned:
            lines.append(
                f"the first factors of {pruned} adapters were pruned 2:4, which changes the model: the norm of what "
                f"was removed is {(removed / total) ** 0.5:.4f} of theirs"
            )
        if self._prune and not self._stored.has_adapters:
            lines.append("there are no adapters to prune")
        if dense:
            lines.append(
                f"the first factors of {dense} adapters lie beside their weights, since they are not 2:4; "
                "--prune-adapters would make them so"
            )
        if apart:
            lines.append(f"the first factors of {apart} adapters lie beside their weights, which are not 2:4")
        return linears, lines

    def _tail(self, name: str) -> CompressedMatrix:
        """The first factor that is appended to a weight: [R, I]."""
        form = self._stored.linears[name]
        if form.appended:
            both = self._stored.appended(name)
            return CompressedMatrix(both.values[form.shape[0] :], both.indices[form.shape[0] :], both.pattern)
        # By magnitude: where a group has fewer than two entries that are not zero, zeros are kept too.
        return CompressedMatrix.prune(self._stored.read(f"{name}.adapter.down"), Pattern(2, 4))

    def _planned(self, name: str, shape: tuple[int, ...], linears: Mapping[str, LinearForm]) -> Planned:
        owner, _, part = name.rpartition(".weight.")
        dtype = torch.uint8 if part == "indices" else self._dtype
        appended = owner in linears and linears[owner].appended

        def rows() -> Iterator[Tensor]:
            for start, stop in row_blocks(self._stored.shapes[name], dtype.itemsize):
                yield cast(self._stored.read(name, start, stop), dtype, name)
            if appended:
                yield cast(getattr(self._tail(owner), part), dtype, name)

        return Planned(name, shape, dtype, rows)


class SlopeModel(StoredModel):
    """A model in the form of our own inference. Every file is hashed when it is opened."""

    def __init__(self, path: Path, tokenizer: Path | None = None, transfer: Transfer | None = None) -> None:
        """Open the folder at `path`.

        Args:
            path: of the folder.
            tokenizer: of the model; None: the one with it.
            transfer: told of the bytes that are hashed.

        Raises:
            UserError: if it is not what `SlopeExport` writes.
        """
        self._path = path
        self._tokenizer_path = tokenizer
        self._description = described(path / SLOPE)
        self.model = self._description.model
        self.dtype = KNOWN_DTYPES[self._description.dtype]
        self.linears = self._linears()
        files = self._description.files
        self._check_sizes(files)
        # Opened before it is hashed: it refuses to read files that change later.
        self._tensors = TensorReader(path, [name for name in files if name.endswith(".safetensors")])
        self._verify(files, transfer or Transfer())
        self._tensors.expect(
            {
                name: (torch.uint8 if name.endswith(".weight.indices") else self.dtype, shape)
                for name, shape in shapes_in_files(self, self.linears).items()
            }
        )
        self.origin = Origin(path, "slope", self._description.step)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `StoredModel`; a first factor that is appended comes expanded."""
        rows = self.shapes[name][0] if stop is None else stop
        owner = name.removesuffix(".adapter.down")
        if owner != name and self.linears[owner].appended:
            first = self.linears[owner].shape[0]
            return self._matrix(owner, first + start, first + rows).expand()
        found = self._tensors.read(name, start, rows)
        if name.endswith(".weight.indices"):
            self._check_metadata(name, found)
        return found

    def appended(self, name: str) -> CompressedMatrix:
        """See `StoredModel`."""
        form = self.linears[name]
        assert form.appended
        return self._matrix(name, 0, form.shape[0] + form.adapter_rank)

    def tokenizer(self) -> Tokenizer:
        """The one that was given, or the one with it; it must be the one that its maker had, where that is known."""
        kept = self._description.tokenizer
        if self._tokenizer_path is None:
            if kept is None:
                raise UserError(f"{self._path} was written without a tokenizer; name it with --tokenizer PATH")
            found = self._path / next(name for name in TOKENIZER_FILES if name in kept.files)
        else:
            found = self._tokenizer_path
        tokenizer = load_tokenizer(found)
        if kept is not None and tokenizer.sha256 != kept.sha256:
            raise UserError(
                f"{found} is not the tokenizer of {self._path}: expected SHA-256 {kept.sha256:.12}..., found "
                f"{tokenizer.sha256:.12}..."
            )
        if kept is not None and kept.end_of_document not in (None, tokenizer.end_of_document):
            raise UserError(
                f"{found} ends a document with id {tokenizer.end_of_document}, and the tokenizer of {self._path} with "
                f"id {kept.end_of_document}; name the one of the corpus, with its tokenizer_config.json"
            )
        if tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(
                f"{found} is not the tokenizer of {self._path}: it has {tokenizer.vocab_size} ids, and the model "
                f"{self.model.vocab_size}"
            )
        return tokenizer

    def _matrix(self, name: str, start: int, stop: int) -> CompressedMatrix:
        """Rows of a sparse weight as they lie in the files."""
        pattern = self.linears[name].pattern
        assert pattern is not None
        values, indices = (self._tensors.read(f"{name}.weight.{part}", start, stop) for part in ("values", "indices"))
        self._check_metadata(f"{name}.weight.indices", indices)
        return CompressedMatrix(values, indices, pattern)

    def _check_metadata(self, name: str, indices: Tensor) -> None:
        pattern = self.linears[name.removesuffix(".weight.indices")].pattern
        assert pattern is not None
        try:
            codec.check(indices, pattern)
        except ValueError as error:
            raise UserError(f"{self._tensors.place(name)}: {name}: {error}") from error

    def _linears(self) -> dict[str, LinearForm]:
        where, described = self._path / SLOPE, self._description.linears
        for name in self.skeleton.linears.keys() ^ described.keys():
            expected, found = ("none", "one") if name in described else ("one", "none")
            raise UserError(f"{where}: linears: {visible(name)[:100]}: expected {expected}, found {found}")
        forms = {}
        for name, (shape, bias) in self.skeleton.linears.items():
            stored = described[name]
            pattern = None if stored.pattern is None else Pattern.parse(stored.pattern)
            form = LinearForm(shape, pattern, stored.adapter_rank, stored.appended, bias)
            if name in PROJECTIONS and (pattern or form.adapter_rank):
                raise UserError(f"{where}: linears: {name}: expected it dense, without an adapter, found another form")
            if pattern is not None and shape[1] % 8:
                raise UserError(f"{where}: linears: {name}: expected no pattern on {shape[1]} columns, found {pattern}")
            if form.appended and not (form.adapter_rank and pattern is not None and pattern.is_two_four):
                raise UserError(
                    f"{where}: linears: {name}: expected an appended factor on a 2:4 weight with an adapter, found "
                    f"pattern {pattern}, rank {form.adapter_rank}"
                )
            forms[name] = form
        return forms

    def _check_sizes(self, files: Mapping[str, StoredFile]) -> None:
        for name, entry in files.items():
            size = stamp_of(self._path / name)[0]
            if size != entry.bytes:
                raise UserError(f"{self._path / name}: expected {entry.bytes} bytes, found {size}")

    def _verify(self, files: Mapping[str, StoredFile], transfer: Transfer) -> None:
        transfer.begin(sum(entry.bytes for entry in files.values()))
        for name, entry in files.items():
            try:
                found = sha256_of(self._path / name, transfer)
            except OSError as error:
                raise UserError(f"{self._path / name}: cannot be read: {error.strerror or error}") from error
            if found != entry.sha256:
                raise UserError(f"{self._path / name}: expected SHA-256 {entry.sha256}, found {found}")


def shapes_in_files(stored: StoredModel, linears: Mapping[str, LinearForm]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the files, in their order, by name, where linear layers lie as `linears` says."""
    shapes = dict(stored.shapes)
    for name, form in linears.items():
        if form.appended:
            del shapes[f"{name}.adapter.down"]
            for part in ("values", "indices"):
                rows, columns = shapes[f"{name}.weight.{part}"]
                shapes[f"{name}.weight.{part}"] = (rows + form.adapter_rank, columns)
    return shapes


def described(path: Path) -> Description:
    """What a slope.json says, believing nothing.

    Raises:
        UserError: if it cannot be read, is damaged, or is none of this version.
    """
    try:
        content = unseal(read_bounded(path, MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {visible(str(error))[:300]}") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: expected format {FORMAT_VERSION}, found {version!r:.80}")
    try:
        description = Description.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path}: {visible(what)[:300]}") from None
    if description.tokenizer is not None:
        own = set(description.tokenizer.files)
        if not own & set(TOKENIZER_FILES) or own - description.files.keys():
            expected = f"{' or '.join(TOKENIZER_FILES)}, and no file that is not among the files"
            raise UserError(f"{path}: tokenizer: expected {expected}, found {sorted(own)!r:.100}")
    return description
