"""A tokenizer from whatever a user has of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

from slope_dist.data import json_tokenizer, sentencepiece_model
from slope_dist.data.json_tokenizer import JsonTokenizer
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer
from slope_dist.data.tokenizer import MAX_BYTES, Tokenizer
from slope_dist.errors import UserError
from slope_dist.files import read_bounded

FILES = (json_tokenizer.FILE, sentencepiece_model.FILE)
"""What a tokenizer is called in a corpus folder, which has one of them."""

_LOADED: WeakValueDictionary[tuple[object, ...], Tokenizer] = WeakValueDictionary()
_PAIR = ("vocab.json", "merges.txt")
_KNOWN = f"{', '.join(FILES)}, or {' with '.join(_PAIR)}"


def load_tokenizer(path: Path | str, end_of_document: str | None = None) -> Tokenizer:
    """Load a SentencePiece model, a tokenizer.json, or the first of these that a folder holds, GPT-2's pair the last.

    Args:
        path: a file, or a folder such as Hugging Face's models have.
        end_of_document: token that ends a document; None: the one that tokenizer_config.json beside it names, or one
            that is known to. A SentencePiece model has its own.

    Raises:
        UserError: a file cannot be read, is of another kind, has no or several ends, or changes text.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = _chosen(path)
        config = path.with_name(json_tokenizer.CONFIG_FILE)
        named = end_of_document is None and config.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read tokenizer {path!s:.100}: {getattr(error, 'strerror', error)}") from error
    if path.suffix != ".json":
        if end_of_document is not None:
            raise UserError(
                f"{path} is a SentencePiece model, which has an end of document of its own; leave --end-of-document out"
            )
        return _once(SentencePieceTokenizer, _read(path), path=path)
    if named:
        end_of_document = json_tokenizer.end_of_config(_read(config), config)
    if path.name == _PAIR[0]:
        vocabulary, merges = (_read(path.with_name(name)) for name in _PAIR)
        model = json_tokenizer.of_vocabulary(vocabulary, merges, path=path.parent)
        return _once(JsonTokenizer, model, end=end_of_document, path=path.parent)
    return _once(JsonTokenizer, _read(path), end=end_of_document, path=path)


def _once(kind: Callable[..., Tokenizer], model: bytes, *, path: Path, **how: str | None) -> Tokenizer:
    """The tokenizer of these bytes, which all splits of all corpora of a run share."""
    key = kind, hashlib.sha256(model).digest(), *how.values()
    tokenizer = _LOADED.get(key)
    if tokenizer is None:
        tokenizer = _LOADED[key] = kind(model, path=path, **how)
    return tokenizer


def _chosen(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    if not all((folder / name).exists() for name in _PAIR):
        raise UserError(f"folder {folder} holds no tokenizer: {_KNOWN}")
    return folder / _PAIR[0]


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from error
    except ValueError as error:
        # Of a path with a NUL, which would spoil the message.
        raise UserError(f"cannot read tokenizer {str(path)!r}: {error}") from error
