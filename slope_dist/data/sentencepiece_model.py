"""A SentencePiece tokenizer that gives every text back exactly.

SentencePiece writes a space as U+2581 and reads U+2581 back as a space, so a text that holds U+2581 itself would not
survive. `SentencePieceTokenizer` spells that one character as its three UTF-8 byte pieces, which are read back as they
are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slope_dist.data.tokenizer import NEWLINE, PROBE, SPACE_MARK, SpaceMarks, Tokenizer
from slope_dist.errors import UserError

END_OF_DOCUMENT_PIECE = "<|endoftext|>"
FILE = "tokenizer.model"

# 256 bytes, newline, unknown, end of document, and one character.
_MIN_VOCAB = 260
_MAX_TRAINING_LINE = 4096
_CUT_LENGTH = 200
"""Characters after which a text is cut at the next newline. SentencePiece takes a fifth less time for lines than for a
document of them."""


def train_tokenizer(lines: Iterable[str], vocab_size: int, *, where: str = "the text") -> bytes:
    """Train a byte-pair model on `lines` and return it as the bytes of a SentencePiece file.

    Args:
        lines: text without newlines; blanks are kept as they are. Held in memory, as the trainer needs them all.
        vocab_size: exact number of ids, among them 256 bytes, newline, unknown and end of document.
        where: what the lines are, for messages.

    Raises:
        UserError: the text has too few different pieces for `vocab_size`, or too many characters.

    The same lines in the same order give the same bytes: one thread, no sampling by the trainer.
    """
    import sentencepiece

    if not _MIN_VOCAB <= vocab_size < 2**31:
        raise UserError(
            f"vocabulary of {vocab_size} is out of range; use at least {_MIN_VOCAB} (the bytes alone are 256)"
        )
    sentences = [
        line[start : start + _MAX_TRAINING_LINE]
        for line in lines
        # NUL ends a C string inside the trainer; as a byte piece it needs no training.
        for line in [line.replace("\0", "")]
        for start in range(0, len(line), _MAX_TRAINING_LINE)
    ]
    if not sentences:
        raise UserError(f"{where} has no text to train a tokenizer on; give text, or a tokenizer")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            user_defined_symbols=[NEWLINE],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT_PIECE,
            character_coverage=0.9995,
            max_sentence_length=4 * _MAX_TRAINING_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size, where) from error
    return model.getvalue()


def _training_error(message: str, vocab_size: int, where: str) -> Exception:
    if found := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocabulary of {vocab_size} is too large for {where}: it has no more than {found[1]} pieces; "
            f"use a vocabulary of at most {found[1]}, or more text"
        )
    if found := re.search(r"(\d+) vs (\d+)", message):
        return UserError(
            f"vocabulary of {vocab_size} is too small for {where}: bytes and single characters alone need "
            f"{found[2]}; use a vocabulary of at least {found[2]}"
        )
    return RuntimeError(message)


class SentencePieceTokenizer(Tokenizer):
    """A loaded SentencePiece model that was checked to be lossless."""

    def __init__(self, model: bytes, *, path: Path | str = "tokenizer"):
        """Load the bytes of a SentencePiece file; `path` is used in messages.

        Raises:
            UserError: not a SentencePiece model, without byte fallback or end id, or one that changes text.
        """
        import sentencepiece
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2.ModelProto()
        try:
            if not model:
                raise DecodeError("empty")
            proto.ParseFromString(model)
            # Text that is no UTF-8 comes as bytes, and the library's message about it may be none either.
            if not all(isinstance(p.piece, str) for p in proto.pieces):
                raise DecodeError("not UTF-8")
            processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} is not a SentencePiece model: empty, damaged or of another kind; "
                "give a .model file that SentencePiece wrote"
            ) from error
        pieces = proto.pieces
        super().__init__(model, [_bytes_of(p) for p in pieces])
        self.end_of_document = processor.eos_id()
        self._processor = processor
        byte_ids = {int(p.piece[3:5], 16): i for i, p in enumerate(pieces) if p.type == p.BYTE}
        self._space_marks = SpaceMarks((p.piece for p in pieces if p.type in (p.NORMAL, p.USER_DEFINED)), byte_ids)
        # Text may be cut after a newline only where no piece reaches over it and no prefix is added to a part.
        self._newline_is_a_piece = not proto.normalizer_spec.add_dummy_prefix and [
            (p.piece, p.type == p.USER_DEFINED) for p in pieces if NEWLINE in p.piece
        ] == [(NEWLINE, True)]
        if len(byte_ids) != 256:
            raise UserError(
                f"{path} cannot spell every text: it has {len(byte_ids)} of 256 byte pieces; "
                "use a model trained with byte_fallback"
            )
        if self.end_of_document < 0:
            raise UserError(
                f"{path} has no end-of-document id; use a model trained with eos_id set to an id of its own"
            )
        self._check_lossless(
            path,
            PROBE,
            "use a model trained with normalization_rule_name identity and remove_extra_whitespaces false",
        )

    def files(self) -> dict[str, bytes]:
        """The model."""
        return {FILE: self.model}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without end-of-document ids: int32 [T] each."""
        marks = [self._space_marks.stand_in(text) for text in texts]
        parts: list[str] = []
        counts: list[int] = []
        for text, mark in zip(texts, marks, strict=True):
            own = self._cut(text.replace(SPACE_MARK, mark) if mark else text)
            parts.extend(own)
            counts.append(len(own))
        encoded = iter(self._processor.encode(parts, num_threads=1))
        batch = []
        for count, mark in zip(counts, marks, strict=True):
            listed: list[int] = []
            for _ in range(count):
                listed += next(encoded)
            ids = np.array(listed, dtype=np.int32)
            batch.append(self._space_marks.put_back(ids, mark) if mark else ids)
        return batch

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; ids that are no text, such as the end of a document, give nothing."""
        return self._processor.decode(np.asarray(ids, dtype=np.int64).tolist())

    def _cut(self, text: str) -> list[str]:
        """`text` in parts of about `_CUT_LENGTH` characters that encode as the whole does."""
        if not self._newline_is_a_piece or len(text) <= _CUT_LENGTH:
            return [text]
        parts = []
        start = 0
        while start < len(text):
            newline = text.find(NEWLINE, start + _CUT_LENGTH)
            stop = len(text) if newline < 0 else newline + 1
            parts.append(text[start:stop])
            start = stop
        return parts


def _bytes_of(piece: Any) -> bytes:
    if piece.type == piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    if piece.type in (piece.NORMAL, piece.USER_DEFINED):
        return piece.piece.replace(SPACE_MARK, " ").encode()
    return b""
