"""One split of a prepared corpus, checked before it is read and memory-mapped by Megatron-core's own reader.

That reader trusts its index: offsets outside the file, counts in the billions or another dtype would end in a struct
error, an endless allocation or silently other tokens. So `read_index` checks the index byte for byte first.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slope_dist.data.jobs import SPLITS
from slope_dist.data.journal import file_sha256
from slope_dist.data.load_tokenizer import FILES, load_tokenizer
from slope_dist.data.prepare import FORMAT, MANIFEST, megatron_indexed_dataset
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.files import read_bounded

if TYPE_CHECKING:
    import torch

    from slope_dist.config.schema import Config

# The label of a position that no loss is taken of.
IGNORED_LABEL = -100

_MAX_MANIFEST_BYTES = 2**26
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Megatron-core's codes of integer dtypes; its float dtypes are no token ids.
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 20
_AGAIN = "prepare the corpus again with tools/prepare_data.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What an index file says: the dtype of the tokens, how many documents, how many tokens in all."""

    dtype: np.dtype[Any]
    documents: int
    tokens: int


def read_index(path: Path, bin_bytes: int) -> Index:
    """Read a Megatron-core .idx file and check that it describes exactly a .bin file of `bin_bytes` bytes.

    Sequences must lie one after another without holes, and documents must cover them, so that any run of tokens is
    one slice of the .bin file.

    Raises:
        UserError: the index is truncated, damaged, of another kind, or of another .bin file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{path} is not a Megatron-core index: {_found(size, header)}; {_AGAIN}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{path} has version {version} and dtype code {code}, not version 1 and an integer dtype; {_AGAIN}"
        )
    expected = _HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes where its header of {sequences} sequences and {boundaries} document "
            f"boundaries needs {expected}: truncated or damaged; {_AGAIN}"
        )
    if sequences == 0 or boundaries < 2:
        raise UserError(f"{path} holds no document; {_AGAIN} from text that has some")
    dtype = np.dtype(_DTYPES[code])
    raw = np.memmap(path, mode="r")
    lengths_at = _HEADER.size
    pointers_at = lengths_at + 4 * sequences
    boundaries_at = pointers_at + 8 * sequences
    end = 0
    for start in range(0, sequences, _CHUNK):
        count = min(_CHUNK, sequences - start)
        lengths = np.frombuffer(raw, "<i4", count, lengths_at + 4 * start).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", count, pointers_at + 8 * start)
        if lengths.min() < 0:
            raise UserError(f"{path} has a sequence of negative length: damaged; {_AGAIN}")
        ends = end + np.cumsum(lengths * dtype.itemsize)
        if pointers[0] != end or not np.array_equal(pointers[1:], ends[:-1]):
            raise UserError(
                f"{path} has offsets that do not follow from its lengths near sequence {start}: damaged; {_AGAIN}"
            )
        end = int(ends[-1])
    previous = 0
    for start in range(0, boundaries, _CHUNK):
        count = min(_CHUNK, boundaries - start)
        marks = np.frombuffer(raw, "<i8", count, boundaries_at + 8 * start)
        if (start == 0 and marks[0] != 0) or marks[0] < previous or (marks[1:] < marks[:-1]).any():
            raise UserError(f"{path} has document boundaries out of order: damaged; {_AGAIN}")
        previous = int(marks[-1])
    if previous != sequences:
        raise UserError(f"{path} ends its last document at sequence {previous}, not {sequences}: damaged; {_AGAIN}")
    if end != bin_bytes:
        raise UserError(
            f"{path.with_suffix('.bin')} has {bin_bytes} bytes where its index says {end}: truncated, or of "
            f"another corpus; {_AGAIN}"
        )
    return Index(dtype=dtype, documents=boundaries - 1, tokens=end // dtype.itemsize)


def _found(size: int, header: bytes) -> str:
    return f"{size} bytes, fewer than a header" if len(header) < _HEADER.size else "its first bytes are others"


class Corpus:
    """Tokens of one split, by position.

    Attributes:
        path: the .bin file.
        split: "train" or "valid".
        num_tokens, num_documents: sizes of the split.
        vocab_size: vocabulary that the ids were checked against.
        max_id: largest id of the split.
        text_bytes: UTF-8 bytes of the split's text; None for a corpus without manifest and tokenizer.
        tokenizer_sha256: hash of the tokenizer; None where the folder has none.
        end_of_document: id that ends a document; None where the folder has no tokenizer.
        has_manifest: whether the folder has a manifest; without one, every token was read when this was opened.
        fingerprint: names the data. With a manifest, a hash of what it states: the SHA-256 of the tokenizer, which was
            compared, and of the tokens of all splits, which `verify` compares. Without one, a hash of the tokenizer
            and of this split's tokens as they were read.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int):
        """Use `open`."""
        self.folder = folder
        self.split = split
        self.vocab_size = vocab_size
        self.path = folder / f"{split}.bin"
        if not folder.is_dir():
            raise UserError(f"no corpus in {folder}; make one with tools/prepare_data.py")
        self._tokenizer = self._load_tokenizer()
        self.tokenizer_sha256 = self._tokenizer.sha256 if self._tokenizer else None
        self.end_of_document = self._tokenizer.end_of_document if self._tokenizer else None
        self._manifest = _read_manifest(folder / MANIFEST)
        self.has_manifest = self._manifest is not None
        entry = self._check_manifest() if self._manifest else None
        for path in (self.path, self.path.with_suffix(".idx")):
            self._check_file(path, entry)
        index = read_index(self.path.with_suffix(".idx"), self.path.stat().st_size)
        self.num_tokens = index.tokens
        self.num_documents = index.documents
        self._dtype = index.dtype
        self.text_bytes: int | None = entry["text_bytes"] if entry else None
        if self._manifest and entry:
            self._check_against_index(index, entry)
            self.max_id: int = entry["max_id"]
            self.fingerprint = _fingerprint(self._manifest)
            if self.max_id >= vocab_size:
                raise _too_large(self.path, self.max_id, None, vocab_size)
        dataset = megatron_indexed_dataset().IndexedDataset(str(folder / split), mmap=True)
        self._reader = dataset.bin_reader
        if not self._manifest:
            self._scan()

    @classmethod
    def open(cls, folder: Path | str, split: str, vocab_size: int) -> Corpus:
        """Open and check one split of the corpus in `folder`.

        A corpus made elsewhere (no manifest.json) is read through once, to check its ids.

        Args:
            folder: the corpus folder.
            split: "train" or "valid".
            vocab_size: ids must be below it.

        Raises:
            UserError: a file is missing, empty, truncated, damaged, of another corpus, or has ids too large.
        """
        try:
            return cls(Path(folder), split, vocab_size)
        except OSError as error:
            raise UserError(f"cannot read corpus {folder}: {error.strerror or error}") from error

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies with the corpus; None for a corpus made elsewhere that has none."""
        return self._tokenizer

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the split, documents one after another: a new int64 [count] array.

        Raises:
            ValueError: the range is not inside the split.
            UserError: an id is not below the vocabulary size; names the file and the position.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise ValueError(f"tokens {start} to {start + count} of {self.num_tokens} in {self.path}")
        # A copy: what the reader returns points into a mapping that is gone when the reader is.
        ids = np.array(self._reader.read(dtype=self._dtype, count=count, offset=start * self._dtype.itemsize), np.int64)
        if count and (ids.max() >= self.vocab_size or ids.min() < 0):
            bad = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
            raise _too_large(self.path, int(ids[bad]), start + bad, self.vocab_size)
        return ids

    def bytes_of(self, labels: torch.Tensor) -> int | None:
        """UTF-8 bytes of the text that `labels` spell; None without a tokenizer.

        Over every token of the split this is `text_bytes`, but for a given tokenizer that puts a space before each
        document, which counts as a byte here.

        Args:
            labels: ids of this corpus, int64 of any shape; those that are `IGNORED_LABEL` do not count.

        Raises:
            UserError: an id that the tokenizer does not have.
        """
        if self._piece_bytes is None:
            return None
        ids = labels.detach().cpu().numpy()
        ids = ids[ids != IGNORED_LABEL]
        largest = int(ids.max(initial=0))
        if largest >= len(self._piece_bytes):
            raise self._without_piece(largest, len(self._piece_bytes))
        return int(self._piece_bytes[ids].sum())

    def differs_from(self, config: Config) -> list[str]:
        """One line for each setting of `config` about making a corpus that this one, already there, does not follow.

        A corpus made elsewhere has no manifest, so nothing is known to differ.
        """
        if self._manifest is None:
            return []
        made, data = self._manifest, config.data
        lines = []
        if made["valid_fraction"] != data.valid_fraction:
            lines.append(
                f"data.valid_fraction {data.valid_fraction} does not apply: {self.folder} was split with "
                f"{made['valid_fraction']}"
            )
        if made["seed"] != config.run.seed:
            lines.append(
                f"run.seed {config.run.seed} does not apply to the split into train and valid: {self.folder} was "
                f"split with seed {made['seed']}"
            )
        kind = made["source"].get("kind")
        if data.source is not None and data.source != kind:
            lines.append(f'data.source "{data.source}" does not apply: {self.folder} was made from "{kind}"')
        # Where the run would not have trained the tokenizer, a larger vocabulary is the model's own affair.
        trains = data.source is not None and data.tokenizer is None
        if trains and made["vocab_size"] != config.model.vocab_size:
            lines.append(
                f"model.vocab_size {config.model.vocab_size} is not the size of the tokenizer: that of {self.folder} "
                f"has {made['vocab_size']} ids"
            )
        return lines + self._differing_tokenizer(data.tokenizer)

    def verify(self) -> None:
        """Read all files of the split and compare their SHA-256 with the manifest's.

        Raises:
            UserError: a file differs or cannot be read, or there is no manifest to compare with.
        """
        if self._manifest is None:
            raise UserError(f"{self.folder} has no {MANIFEST}, so its files cannot be verified; {_AGAIN}")
        entry = self._manifest["splits"][self.split]
        for kind in ("bin", "idx"):
            path = self.path.with_suffix(f".{kind}")
            try:
                found = file_sha256(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
            if found != entry[f"{kind}_sha256"]:
                raise UserError(
                    f"{path} was altered: its SHA-256 is {found}, the manifest's {entry[f'{kind}_sha256']}; {_AGAIN}"
                )

    @cached_property
    def _piece_bytes(self) -> np.ndarray | None:
        return self._tokenizer.piece_bytes() if self._tokenizer else None

    def _without_piece(self, token_id: int, pieces: int) -> UserError:
        return UserError(
            f"{self.path} has id {token_id}, but its tokenizer in {self.folder} has {pieces} ids; "
            "put the right tokenizer there, or none"
        )

    def _differing_tokenizer(self, given: str | None) -> list[str]:
        if given is None:
            return []
        try:
            other = load_tokenizer(given)
        except UserError as error:
            return [f"data.tokenizer does not apply ({error}): {self.folder} has a tokenizer, which is used"]
        same = (other.sha256, other.end_of_document) == (self.tokenizer_sha256, self.end_of_document)
        return [] if same else [f"data.tokenizer {given} does not apply: {self.folder} was made with another one"]

    def _load_tokenizer(self) -> Tokenizer | None:
        found = [name for name in FILES if (self.folder / name).exists()]
        if len(found) > 1:
            raise UserError(
                f"{self.folder} has both {' and '.join(found)}; remove the one that it was not made with, or {_AGAIN}"
            )
        return load_tokenizer(self.folder / found[0]) if found else None

    def _check_manifest(self) -> dict[str, Any]:
        assert self._manifest is not None
        splits = self._manifest["splits"]
        if self.split not in splits:
            raise UserError(f"{self.folder} has no {self.split} split; {_AGAIN}")
        # Those who wrote no name knew of one kind only.
        path = self.folder / str(self._manifest.get("tokenizer", FILES[-1]))
        if self.tokenizer_sha256 is None:
            raise UserError(f"{path} is missing; put it back, or {_AGAIN}")
        if self.tokenizer_sha256 != self._manifest["tokenizer_sha256"]:
            raise UserError(
                f"{path} is not the tokenizer that the corpus was made with: its SHA-256 starts with "
                f"{self.tokenizer_sha256[:12]}, the manifest's with {self._manifest['tokenizer_sha256'][:12]}; "
                f"put the right one back, or {_AGAIN}"
            )
        if self.end_of_document != self._manifest.get("end_of_document", self.end_of_document):
            raise UserError(
                f"{path} has the end-of-document id {self.end_of_document}, the manifest "
                f"{self._manifest['end_of_document']}: tokenizer_config.json beside it was altered; put it back, or "
                f"{_AGAIN}"
            )
        return splits[self.split]

    def _check_file(self, path: Path, entry: dict[str, Any] | None) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing; {_AGAIN}")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} is empty; {_AGAIN}")
        if entry and size != entry[f"{path.suffix[1:]}_bytes"]:
            raise UserError(
                f"{path} has {size} bytes where the manifest says {entry[f'{path.suffix[1:]}_bytes']}: truncated "
                f"or altered; {_AGAIN}"
            )

    def _check_against_index(self, index: Index, entry: dict[str, Any]) -> None:
        assert self._manifest is not None
        in_index = (index.dtype.name, index.tokens, index.documents)
        in_manifest = (self._manifest["dtype"], entry["tokens"], entry["documents"])
        if in_index != in_manifest:
            raise UserError(
                f"{self.path.with_suffix('.idx')} says dtype, tokens, documents {in_index}, the manifest "
                f"{in_manifest}: damaged or of another corpus; {_AGAIN}"
            )

    def _scan(self) -> None:
        """Set max_id, fingerprint and text_bytes of a corpus without a manifest; checks every id on the way."""
        digest = hashlib.sha256(f"{self._dtype.name} {self.tokenizer_sha256} ".encode())
        piece_bytes = self._piece_bytes
        text_bytes = 0
        self.max_id = 0
        for start in range(0, self.num_tokens, _CHUNK):
            ids = self.tokens(start, min(_CHUNK, self.num_tokens - start))
            self.max_id = max(self.max_id, int(ids.max()))
            digest.update(ids.astype(self._dtype).tobytes())
            if piece_bytes is not None:
                if self.max_id >= len(piece_bytes):
                    raise self._without_piece(self.max_id, len(piece_bytes))
                text_bytes += int(piece_bytes[ids].sum())
        self.text_bytes = None if piece_bytes is None else text_bytes
        self.fingerprint = digest.hexdigest()


def _too_large(path: Path, token_id: int, position: int | None, vocab_size: int) -> UserError:
    where = "" if position is None else f" at token {position}"
    return UserError(
        f"{path} has id {token_id}{where}, which is not an id of a vocabulary of {vocab_size} (model.vocab_size); "
        "raise it, or prepare the corpus with that vocabulary"
    )


def _fingerprint(manifest: dict[str, Any]) -> str:
    identity = {
        "tokenizer": manifest["tokenizer_sha256"],
        "tokens": {name: entry["bin_sha256"] for name, entry in manifest["splits"].items()},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


_MANIFEST_TYPES = {
    "format": int,
    "vocab_size": int,
    "dtype": str,
    "tokenizer_sha256": str,
    "source": dict,
    "valid_fraction": float,
    "seed": int,
    "splits": dict,
}
_SPLIT_TYPES = {
    "documents": int,
    "tokens": int,
    "text_bytes": int,
    "max_id": int,
    "bin_bytes": int,
    "idx_bytes": int,
    "bin_sha256": str,
    "idx_sha256": str,
}


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, with the types of all that is used checked; None where there is none."""
    if not path.exists():
        return None
    try:
        manifest = json.loads(read_bounded(path, _MAX_MANIFEST_BYTES).decode())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: damaged; {_AGAIN}") from error
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')!r}; this program reads {FORMAT}; {_AGAIN}")
    if not _has_types(manifest, _MANIFEST_TYPES):
        raise UserError(f"{path} is not a corpus manifest: damaged; {_AGAIN}")
    for split, entry in manifest["splits"].items():
        if split not in SPLITS or not _has_types(entry, _SPLIT_TYPES):
            raise UserError(f"{path} describes split {split!r} incompletely: damaged; {_AGAIN}")
    return manifest


def _has_types(value: object, types: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(type(value.get(key)) is expected for key, expected in types.items())
