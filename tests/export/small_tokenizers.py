"""A small tokenizer of each kind, made once."""

from __future__ import annotations

import random
from functools import cache

from slope_dist.data.json_tokenizer import JsonTokenizer
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from tests.data.test_json_tokenizer import byte_level

KINDS = ("json", "sentencepiece")
VOCAB_SIZE = 400


@cache
def small_tokenizer(kind: str) -> Tokenizer:
    """Of at most `VOCAB_SIZE` ids."""
    if kind == "json":
        return JsonTokenizer(byte_level().to_str().encode())
    draw = random.Random(2)
    text = "the sparse weight is kept in groups of four and two of them stay while others go"
    words = text.split()
    lines = [" ".join(draw.choices(words, k=9)) for _ in range(400)]
    return SentencePieceTokenizer(train_tokenizer(lines, 390))
