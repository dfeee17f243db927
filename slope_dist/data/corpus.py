"""One split of a corpus, checked before it is read.

Tokens are read by position, not through a mapping of the file: a mapped file that another process cuts short ends in a
bus error, without a word, and every page of it that was touched counts as memory of the run.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slope_dist.data.index import AGAIN, Index, read_index
from slope_dist.data.journal import BLOCK_BYTES, blocks_sha256, file_sha256
from slope_dist.data.load_tokenizer import FILES, load_tokenizer
from slope_dist.data.manifest import fingerprint_of, read_manifest
from slope_dist.data.prepare import MANIFEST
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError

if TYPE_CHECKING:
    import torch

    from slope_dist.config.schema import Config

# The label of a position that no loss is taken of.
IGNORED_LABEL = -100

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Summary:
    """What only reading every token of a split tells.

    Attributes:
        tokens: how many.
        tokenizer_sha256: of the tokenizer they were read with; None without one.
        max_id: the largest of them.
        fingerprint: hash of the tokenizer and the tokens.
        text_bytes: UTF-8 bytes that they spell; None without a tokenizer.
    """

    tokens: int
    tokenizer_sha256: str | None
    max_id: int
    fingerprint: str
    text_bytes: int | None


class Corpus:
    """Tokens of one split, by position.

    Attributes:
        path: the .bin file.
        split: "train" or "valid".
        num_tokens, num_documents: sizes of the split.
        vocab_size: vocabulary that the ids were checked against.
        max_id: largest id of the split.
        text_bytes: UTF-8 bytes of the split's text; None for a corpus without manifest and tokenizer.
        tokenizer_sha256: hash of the tokenizer; None where there is none.
        end_of_document: id that ends a document; None where there is no tokenizer.
        has_manifest: whether the folder has a manifest; without one, every token was read, here or by who says so.
        stamps: size, time of last write and inode of the .bin and the .idx file, before anything was read of them.
        fingerprint: names the data. With a manifest, a hash of what it states: the SHA-256 of the tokenizer, which was
            compared, and of the tokens of all splits, which `verify` compares. Without one, a hash of the tokenizer
            and of this split's tokens as they were read.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        vocab_size: int,
        valid_fraction: float,
        tokenizer: str | None,
        summary: Summary | None,
        passed: Callable[[int], None],
    ):
        """Use `open`."""
        self.folder = folder
        self.split = split
        self.vocab_size = vocab_size
        self.path = token_file(folder, split)
        whole = self.path.parent != folder
        self._manifest = None if whole else read_manifest(folder / MANIFEST)
        self.has_manifest = self._manifest is not None
        self._tokenizer = self._load_tokenizer(tokenizer)
        self.tokenizer_sha256 = self._tokenizer.sha256 if self._tokenizer else None
        self.end_of_document = self._tokenizer.end_of_document if self._tokenizer else None
        entry = self._check_manifest() if self._manifest else None
        for path in (self.path, self.index_path):
            self._check_file(path, entry)
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        # Before anything is read of them.
        self._as_opened = _stamp(os.fstat(self._file))
        self.stamps = [list(self._as_opened), list(_stamp(os.stat(self.index_path)))]
        index = read_index(self.index_path, self._as_opened[0])
        self._dtype = index.dtype
        self._first, end, self.num_documents = 0, index.tokens, index.documents
        if whole:
            self._first, end, self.num_documents = self._part(index, valid_fraction)
        self.num_tokens = end - self._first
        if self._manifest and entry:
            self._check_against_index(index, entry)
            self.max_id: int = entry["max_id"]
            self.fingerprint = fingerprint_of(self._manifest)
            self.text_bytes: int | None = entry["text_bytes"]
        else:
            own = (self.num_tokens, self.tokenizer_sha256)
            if summary is None or (summary.tokens, summary.tokenizer_sha256) != own:
                summary = self._scan(passed)
            self.max_id, self.fingerprint, self.text_bytes = summary.max_id, summary.fingerprint, summary.text_bytes
        if self.max_id >= vocab_size:
            raise _too_large(self.path, self.max_id, None, vocab_size)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        split: str,
        vocab_size: int,
        *,
        valid_fraction: float = 0.02,
        tokenizer: str | None = None,
        summary: Summary | None = None,
        passed: Callable[[int], None] = lambda count: None,
    ) -> Corpus:
        """Open and check one split of a corpus.

        Args:
            folder: the corpus folder; or what the names of a .bin and an .idx file begin with, as Megatron-LM's
                preprocessing makes them, of whose documents the last are for validation.
            split: "train" or "valid".
            vocab_size: ids must be below it.
            valid_fraction: share of the documents for validation, where one pair of files holds all.
            tokenizer: that of a corpus that has none with it.
            summary: of a corpus made elsewhere (no manifest.json), where it is known; None: read it through once.
            passed: told of the bytes that are read for that, often.

        Raises:
            UserError: a file is missing, empty, truncated, damaged, of another corpus, or has ids too large.
        """
        try:
            return cls(Path(folder), split, vocab_size, valid_fraction, tokenizer, summary, passed)
        except OSError as error:
            raise UserError(f"cannot read corpus {folder}: {error.strerror or error}") from error

    @property
    def index_path(self) -> Path:
        """The .idx file."""
        return self.path.with_suffix(".idx")

    @property
    def summary(self) -> Summary:
        """What opening this again need not read for."""
        return Summary(self.num_tokens, self.tokenizer_sha256, self.max_id, self.fingerprint, self.text_bytes)

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
        first = self._first + start
        ids = self._read(first, count)
        if count and (ids.max() >= self.vocab_size or (self._dtype.kind == "i" and ids.min() < 0)):
            bad = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
            raise _too_large(self.path, int(ids[bad]), first + bad, self.vocab_size)
        return ids.astype(np.int64)

    def _read(self, first: int, count: int) -> np.ndarray:
        size, begin = self._dtype.itemsize, first * self._dtype.itemsize
        try:
            data = more = os.pread(self._file, count * size, begin)
            # A read of more than 2 GiB, or of some file systems, may give less at a time.
            while more and len(data) < count * size:
                more = os.pread(self._file, count * size - len(data), begin + len(data))
                data += more
        except OSError as error:
            raise UserError(f"cannot read {self.path} at byte {begin}: {error.strerror or error}") from error
        if len(data) < count * size:
            raise UserError(
                f"{self.path} ends at byte {begin + len(data)}, and had {self._as_opened[0]} bytes when it was opened: "
                "it was cut short meanwhile; put it back and start the run again, which resumes"
            )
        return np.frombuffer(data, self._dtype)

    def check_unchanged(self) -> None:
        """See that the file of tokens is the one that was opened, and that nobody has written to it since.

        Raises:
            UserError: it is not, or cannot be found.
        """
        try:
            now = _stamp(os.stat(self.path))
        except OSError as error:
            raise UserError(f"{self.path} was there when the run began: {error.strerror or error}") from error
        if now != self._as_opened:
            raise UserError(
                f"{self.path} was changed while the run reads it (it had {self._as_opened[0]} bytes, now {now[0]}; "
                f"last written {datetime.fromtimestamp(now[1] / 1e9):%Y-%m-%d %H:%M:%S}); put it back and start the "
                "run again, which resumes"
            )

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

        A corpus made elsewhere has no manifest, so of it only its tokenizer and what is asked for are known to differ.
        """
        data, lines = config.data, []
        if self._manifest is None:
            if data.source is not None:
                lines.append(
                    f'data.source "{data.source}" does not apply: {self.folder} is there, and was made elsewhere'
                )
            is_split = self.path.parent == self.folder
            if is_split and data.valid_fraction != type(data).model_fields["valid_fraction"].default:
                lines.append(
                    f"data.valid_fraction {data.valid_fraction} does not apply: {self.folder} is split into train.bin "
                    "and valid.bin already"
                )
            return lines + (self._differing_tokenizer(data.tokenizer) if self._tokenizer else [])
        made = self._manifest
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

    def verify(self, passed: Callable[[int], None] = lambda count: None) -> None:
        """Read all files of the split and compare their SHA-256 with the manifest's.

        Args:
            passed: told of the bytes that are read, often.

        Raises:
            UserError: a file differs or cannot be read, or there is no manifest to compare with.
        """
        if self._manifest is None:
            raise UserError(f"{self.folder} has no {MANIFEST}, so its files cannot be verified; {AGAIN}")
        entry = self._manifest["splits"][self.split]
        for kind in ("bin", "idx"):
            path = self.path.with_suffix(f".{kind}")
            try:
                found = file_sha256(path, passed)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
            if found != entry[f"{kind}_sha256"]:
                where = _altered(path, entry.get("bin_blocks_sha256") if kind == "bin" else None)
                raise UserError(
                    f"{path} was altered{where}: its SHA-256 is {found}, the manifest's {entry[f'{kind}_sha256']}; "
                    f"{AGAIN}"
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

    def _load_tokenizer(self, given: str | None) -> Tokenizer | None:
        found = [name for name in FILES if (self.folder / name).exists()]
        if len(found) > 1:
            raise UserError(
                f"{self.folder} has both {' and '.join(found)}; remove the one that it was not made with, or {AGAIN}"
            )
        if found:
            return load_tokenizer(self.folder / found[0])
        return load_tokenizer(given) if given and not self.has_manifest else None

    def _part(self, index: Index, valid_fraction: float) -> tuple[int, int, int]:
        """First token, end and number of documents of this split, where one pair of files holds both."""
        valid = max(1, round(index.documents * valid_fraction))
        if valid >= index.documents:
            raise UserError(
                f"{self.index_path} has {index.documents} documents, too few for training beside validation "
                f"(data.valid_fraction {valid_fraction})"
            )
        border = index.first_token(index.documents - valid)
        if self.split == "valid":
            return border, index.tokens, valid
        return 0, border, index.documents - valid

    def _check_manifest(self) -> dict[str, Any]:
        assert self._manifest is not None
        splits = self._manifest["splits"]
        if self.split not in splits:
            raise UserError(f"{self.folder} has no {self.split} split; {AGAIN}")
        # Those who wrote no name knew of one kind only.
        path = self.folder / str(self._manifest.get("tokenizer", FILES[-1]))
        if self.tokenizer_sha256 is None:
            raise UserError(f"{path} is missing; put it back, or {AGAIN}")
        if self.tokenizer_sha256 != self._manifest["tokenizer_sha256"]:
            raise UserError(
                f"{path} is not the tokenizer that the corpus was made with: its SHA-256 starts with "
                f"{self.tokenizer_sha256[:12]}, the manifest's with {self._manifest['tokenizer_sha256'][:12]}; "
                f"put the right one back, or {AGAIN}"
            )
        if self.end_of_document != self._manifest.get("end_of_document", self.end_of_document):
            raise UserError(
                f"{path} has the end-of-document id {self.end_of_document}, the manifest "
                f"{self._manifest['end_of_document']}: tokenizer_config.json beside it was altered; put it back, or "
                f"{AGAIN}"
            )
        return splits[self.split]

    def _check_file(self, path: Path, entry: dict[str, Any] | None) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing; {AGAIN}")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path} is empty; {AGAIN}")
        if entry and size != entry[f"{path.suffix[1:]}_bytes"]:
            raise UserError(
                f"{path} has {size} bytes where the manifest says {entry[f'{path.suffix[1:]}_bytes']}: truncated "
                f"or altered; {AGAIN}"
            )

    def _check_against_index(self, index: Index, entry: dict[str, Any]) -> None:
        assert self._manifest is not None
        in_index = (index.dtype.name, index.tokens, index.documents)
        in_manifest = (self._manifest["dtype"], entry["tokens"], entry["documents"])
        if in_index != in_manifest:
            raise UserError(
                f"{self.path.with_suffix('.idx')} says dtype, tokens, documents {in_index}, the manifest "
                f"{in_manifest}: damaged or of another corpus; {AGAIN}"
            )

    def _scan(self, passed: Callable[[int], None]) -> Summary:
        """Read every token, and check its id."""
        digest = hashlib.sha256(f"{self._dtype.name} {self.tokenizer_sha256} ".encode())
        piece_bytes = self._piece_bytes
        text_bytes = max_id = 0
        for start in range(0, self.num_tokens, _CHUNK):
            ids = self.tokens(start, min(_CHUNK, self.num_tokens - start))
            max_id = max(max_id, int(ids.max()))
            digest.update(ids.astype(self._dtype).tobytes())
            passed(len(ids) * self._dtype.itemsize)
            if piece_bytes is not None:
                if max_id >= len(piece_bytes):
                    raise self._without_piece(max_id, len(piece_bytes))
                text_bytes += int(piece_bytes[ids].sum())
        bytes_or_none = None if piece_bytes is None else text_bytes
        return Summary(self.num_tokens, self.tokenizer_sha256, max_id, digest.hexdigest(), bytes_or_none)


def token_file(folder: Path, split: str) -> Path:
    """The .bin file of a split: in the corpus folder, or the one of all splits whose name begins as `folder` says.

    Raises:
        UserError: there is neither.
    """
    own, whole = folder / f"{split}.bin", Path(f"{folder}.bin")
    if own.exists():
        return own
    if whole.exists() or whole.with_suffix(".idx").exists():
        return whole
    if not folder.is_dir():
        raise UserError(
            f"no corpus in {folder}, and no {whole.name} and {whole.stem}.idx beside it; make one with "
            "tools/prepare_data.py"
        )
    return own


def stamps_of(path: Path) -> list[list[int]]:
    """`Corpus.stamps` of a .bin file and its index, as they are now."""
    return [list(_stamp(os.stat(file))) for file in (path, path.with_suffix(".idx"))]


def _stamp(file: os.stat_result) -> tuple[int, int, int]:
    return file.st_size, file.st_mtime_ns, file.st_ino


def _altered(path: Path, blocks: Any) -> str:
    """Where a file differs from what its blocks should be, as far as they tell."""
    if not isinstance(blocks, list):
        return ""
    found = blocks_sha256(path)
    bad = next((number for number, block in enumerate(found) if blocks[number : number + 1] != [block]), None)
    if bad is None:
        return ""
    return f" within bytes {bad * BLOCK_BYTES} to {min((bad + 1) * BLOCK_BYTES, path.stat().st_size)}"


def _too_large(path: Path, token_id: int, position: int | None, vocab_size: int) -> UserError:
    where = "" if position is None else f" at token {position}"
    return UserError(
        f"{path} has id {token_id}{where}, which is not an id of a vocabulary of {vocab_size} (model.vocab_size); "
        "raise it, or prepare the corpus with that vocabulary"
    )
