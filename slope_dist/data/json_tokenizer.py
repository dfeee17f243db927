"""Tokenizers of Hugging Face: a `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`, which become one.

Text is only text here: a document that spells the name of a special token does not become its id, and what a template
would put around a text is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slope_dist.data.tokenizer import PROBE, SPACE_MARK, SpaceMarks, Tokenizer
from slope_dist.errors import UserError

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|end\u2581of\u2581sentence|>")
"""What the end of a document is called in models that do not say so."""

# Ids of an unused range would take memory each; the largest vocabularies have 2^18.
_MOST_IDS = 2**24
_SPECIALS_IN_PROBE = 1000


class JsonTokenizer(Tokenizer):
    """A loaded tokenizer.json that was checked to be lossless.

    Attributes:
        end: the token of the id that ends a document.
    """

    def __init__(self, model: bytes, *, end: str | None = None, path: Path | str = "tokenizer"):
        """Load the bytes of a tokenizer.json; `path` is used in messages.

        Args:
            model: the file's bytes.
            end: token that ends a document; None: the one of `ENDS` that the tokenizer has.

        Raises:
            UserError: not a tokenizer.json, of no known end, one that cannot spell every byte, or that changes text.
        """
        description = _description(model, path)
        _check_model(description.get("model"), path)
        tokenizer = _loaded(model, path)
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        count = max(vocabulary.values(), default=-1) + 1
        if count > _MOST_IDS:
            raise UserError(f"{path} has the id {count - 1}; more than {_MOST_IDS} ids are not supported")
        decoders = set(_kinds(description.get("decoder")))
        if "ByteLevel" in decoders:
            spell = _byte_level_bytes
        elif "ByteFallback" in decoders:
            spell = _byte_fallback_bytes
        else:
            raise UserError(
                f"{path} does not spell text in bytes: its decoder is {_named(decoders)}, not ByteLevel or "
                "ByteFallback, so it would lose text; use a byte-level or byte-fallback tokenizer"
            )
        pieces = [b""] * count
        for token, number in vocabulary.items():
            if number not in special:
                pieces[number] = token.encode() if number in added else spell(token)
        super().__init__(model, pieces)
        self._check_bytes(path)
        self.end = _end_of(path, [added[number].content for number in sorted(special)], end)
        self.end_of_document = vocabulary[self.end]
        self._tokenizer = tokenizer
        byte_ids = {piece[0]: number for number, piece in enumerate(pieces) if len(piece) == 1}
        # Where bytes are a fallback, they are spelled so even for characters that have a piece.
        byte_ids |= {byte: vocabulary[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary}
        self._space_marks = SpaceMarks(vocabulary, byte_ids) if "ByteFallback" in decoders else None
        names = "".join(added[number].content for number in sorted(special)[:_SPECIALS_IN_PROBE])
        normalizers = _named(_kinds(description.get("normalizer")))
        self._check_lossless(path, PROBE + names, f"use one that is lossless (its normalizer is {normalizers})")
        if self.end_of_document in self.encode(self.end):
            raise UserError(
                f"{path} makes its end-of-document id of the text {self.end!r}; name another with --end-of-document"
            )

    def files(self) -> dict[str, bytes]:
        """The tokenizer, and the name of its end, in the form that Hugging Face's own readers know."""
        config = {"eos_token": self.end, "tokenizer_class": "PreTrainedTokenizerFast"}
        return {FILE: self.model, CONFIG_FILE: json.dumps(config, indent=2).encode() + b"\n"}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without end-of-document ids: int32 [T] each."""
        if self._space_marks is None:
            return [np.array(found.ids, dtype=np.int32) for found in self._encoded(texts)]
        marks = [self._space_marks.stand_in(text) for text in texts]
        hidden = [text.replace(SPACE_MARK, mark) if mark else text for text, mark in zip(texts, marks, strict=True)]
        batch = [np.array(found.ids, dtype=np.int32) for found in self._encoded(hidden)]
        return [self._space_marks.put_back(ids, mark) if mark else ids for ids, mark in zip(batch, marks, strict=True)]

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; ids that are no text, such as the end of a document, give nothing."""
        return self._tokenizer.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=True)

    def _check_bytes(self, path: Path | str) -> None:
        found = len({piece for piece in self._pieces if len(piece) == 1})
        if found != 256:
            raise UserError(
                f"{path} cannot spell every text: it has {found} of 256 bytes; use a tokenizer whose vocabulary "
                "has every byte"
            )


def end_of_config(config: bytes, path: Path | str) -> str | None:
    """The end of a document that a tokenizer_config.json names; None where it names none.

    Raises:
        UserError: it is no JSON object.
    """
    token = _description(config, path).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def of_vocabulary(vocabulary: bytes, merges: bytes, *, path: Path | str) -> bytes:
    """The tokenizer.json of GPT-2's pair of files: byte-level pairs, without a space before the text.

    Tokens that are neither a byte nor a merge can come from no text: they are special.

    Raises:
        UserError: a file is not what its name says, or the two do not fit each other.
    """
    ids = _description(vocabulary, f"{path}/vocab.json")
    try:
        "".join(ids).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}/vocab.json is damaged: a token is half a surrogate pair") from error
    if any(type(number) is not int or number < 0 for number in ids.values()) or len(set(ids.values())) != len(ids):
        raise UserError(f"{path}/vocab.json is damaged: a token has no id of its own")
    pairs = []
    try:
        lines = merges.decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}/merges.txt is not UTF-8 text: bad byte at offset {error.start}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise UserError(f"{path}/merges.txt:{number} is no pair of tokens of vocab.json whose merge is another")
        pairs.append(pair)
    made = {"".join(pair) for pair in pairs} | {token for token in ids if token in _BYTES}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordered = sorted(ids, key=lambda token: ids[token])
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **whole} for token in ordered if token not in made],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "vocab": {token: ids[token] for token in ordered}, "merges": pairs},
    }
    return json.dumps(tokenizer, ensure_ascii=False, indent=1).encode() + b"\n"


def _description(content: bytes, path: Path | str) -> dict[str, Any]:
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: empty, damaged or of another kind") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object: damaged or of another kind")
    return found


def _check_model(model: object, path: Path | str) -> None:
    """Refuse what the library does not check, and would panic at."""
    if not isinstance(model, dict):
        raise UserError(f"{path} is not a tokenizer.json: it has no model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        # Of no use where pieces are bytes.
        if model.get(name):
            raise UserError(f"{path} marks the parts of words (its model.{name} is not null), which loses blanks")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocabulary, dict) and isinstance(merges, list):
        for number, pair in enumerate(merges):
            pair = pair.split(" ") if isinstance(pair, str) else pair
            if not (isinstance(pair, list) and all(isinstance(part, str) for part in pair)) or not (
                len(pair) == 2 and {*pair, "".join(pair)} <= vocabulary.keys()
            ):
                raise UserError(f"{path}: model.merges[{number}] is no pair of tokens whose merge is another; damaged")


def _loaded(model: bytes, path: Path | str) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(model)
    except BaseException as error:
        # The library has no class of its own for what it cannot read, and that of its panics is no Exception.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a tokenizer.json, or a damaged one: {reason}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(f"{path} cuts text at random (its dropout is {tokenizer.model.dropout}); set it to null")
    return tokenizer


def _kinds(part: object) -> Iterator[str]:
    """Types of a normalizer or decoder, and of all in it where it is a sequence."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for name in ("decoders", "normalizers"):
            inner = part.get(name)
            for each in inner if isinstance(inner, list) else ():
                yield from _kinds(each)


def _named(kinds: Any) -> str:
    return ", ".join(sorted(set(kinds) - {"Sequence"})) or "none"


def _end_of(path: Path | str, special: list[str], end: str | None) -> str:
    """The special token that ends a document."""
    known = f"its special tokens are {', '.join(special[:8])}" if special else "it has no special tokens"
    if end is not None:
        if end not in special:
            raise UserError(f"{path} has no special token {end!r} to end a document with; {known}")
        return end
    found = [token for token in ENDS if token in special]
    if len(found) != 1:
        what = f"has {' and '.join(found)}, each of which may end" if found else "has no known token to end"
        raise UserError(f"{path} {what} a document; name the token with --end-of-document ({known})")
    return found[0]


def _byte_characters() -> dict[str, int]:
    """The character that byte-level vocabularies write each byte as: itself if it can be seen, or one from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_characters()


def _byte_level_bytes(token: str) -> bytes:
    # A token with any other character stands for itself.
    if any(character not in _BYTES for character in token):
        return token.encode()
    return bytes(_BYTES[character] for character in token)


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPACE_MARK, " ").encode()
