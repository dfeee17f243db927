"""What a tokenizer must be able to do here: give every text back exactly, and end a document with an id of its own."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from slope_dist.errors import UserError

NEWLINE = "\n"
SPACE_MARK = "\u2581"
"""What SentencePiece, and those that follow it, write for a space."""

MAX_BYTES = 2**28
"""Of a tokenizer's file: far more than any holds."""

# What a lossy model would change: runs of blanks, compatibility forms, controls, rare characters, names of controls.
PROBE = "  a\tb  \u2581c\r\n\n\u00a0\ufb01 e\u0301\u00e9 \uff21 \u0000\U0001f469\u200d\U0001f467 \U0010fffe</s><unk>\n "


class Tokenizer(ABC):
    """A loaded tokenizer that was checked to be lossless.

    Attributes:
        vocab_size: number of ids, unused ones among them.
        end_of_document: id that ends a document; no text encodes to it.
        sha256: hash of the tokenizer's file, in hex.
        model: the bytes of that file.
    """

    end_of_document: int

    def __init__(self, model: bytes, pieces: Sequence[bytes]):
        """Keep the file and the bytes that each id stands for, none where it is no text."""
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = len(pieces)
        self._pieces = pieces
        # What some put around a text: a space before it.
        self._around = (b"", b"")

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What `load_tokenizer` needs in a corpus folder, by name."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without end-of-document ids: int32 [T] each."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; ids that are no text, such as the end of a document, give nothing."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, without an end-of-document id: int32 [T]."""
        return self.encode_batch([text])[0]

    @property
    def pieces(self) -> Sequence[bytes]:
        """UTF-8 of the text that each id stands for, which may end within a character; empty where it is no text."""
        return self._pieces

    def piece_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text each id stands for: int32 [vocab_size]; 0 for ids that are no text."""
        return np.fromiter(map(len, self._pieces), dtype=np.int32, count=self.vocab_size)

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether each id is the same text in both and the same one ends a document, whatever their files are."""
        return list(self._pieces) == list(other._pieces) and self.end_of_document == other.end_of_document

    def spells(self, ids: np.ndarray, text: bytes) -> bool:
        """Whether the pieces of `ids`, one after another, are exactly this text in UTF-8."""
        spelled = b"".join(map(self._pieces.__getitem__, ids.tolist()))
        before, after = self._around
        return spelled == (before + text + after if text else text)

    def _check_lossless(self, path: Path | str, probe: str, remedy: str) -> None:
        """Refuse a tokenizer that changes text, or whose pieces are not what it decodes them to."""
        around = b"".join(map(self._pieces.__getitem__, self.encode("a").tolist()))
        if around in (b" a", b"a "):
            before, _, after = around.partition(b"a")
            self._around = (before, after)
        ids = self.encode(probe)
        if self.decode(ids) != probe or not self.spells(ids, probe.encode()):
            raise UserError(f"{path} changes text: blanks or characters are lost; {remedy}")


class SpaceMarks:
    """Texts that hold U+2581 itself, for models in which that character is a space.

    It is hidden behind a character that no piece has, which such a model spells in bytes; they are then replaced.

    Args:
        pieces: texts of all pieces.
        byte_ids: id of each of the 256 bytes.
    """

    def __init__(self, pieces: Iterable[str], byte_ids: dict[int, int]):
        self._characters = set("".join(pieces))
        self._byte_ids = byte_ids

    def stand_in(self, text: str) -> str:
        """A character that is in neither `text` nor any piece; "" where `text` has no U+2581."""
        if SPACE_MARK not in text:
            return ""
        used = self._characters.union(text)
        return next(mark for mark in map(chr, range(0x10FFFF, 0xFFFF, -1)) if mark not in used)

    def put_back(self, ids: np.ndarray, mark: str) -> np.ndarray:
        """`ids` with the byte pieces of U+2581 where those of its stand-in are."""
        stand_in = [self._byte_ids[byte] for byte in mark.encode()]
        space_mark = [self._byte_ids[byte] for byte in SPACE_MARK.encode()]
        kept: list[int] = []
        listed = ids.tolist()
        position = 0
        while position < len(listed):
            if listed[position : position + len(stand_in)] == stand_in:
                kept.extend(space_mark)
                position += len(stand_in)
            else:
                kept.append(listed[position])
                position += 1
        return np.array(kept, dtype=np.int32)
