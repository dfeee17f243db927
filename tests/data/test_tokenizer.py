"""Claim: a tokenizer trained here has exactly the size asked for, is the same each time, and loses no text.

python -m pytest tests/data/test_tokenizer.py
"""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.sentencepiece_model import END_OF_DOCUMENT_PIECE, SentencePieceTokenizer, train_tokenizer
from slope_dist.errors import UserError

LINES = [f"    if self.value == {number}: return 'é' * {number}" for number in range(300)]

ODD_TEXTS = {
    "empty": "",
    "blanks": "   a  b   ",
    "only blanks": "      ",
    "tabs": "\t\tx\ty\t",
    "crlf": "a\r\nb\r\n\r\n",
    "newlines": "\n\n\na\n",
    "nul": "\0a\0\0",
    "sentencepiece's blank": "▁a ▁▁ b▁",
    "sentencepiece's unknown": "\u2047 ⁇ <unk>",
    "names of controls": f"<s></s><pad><0x0A><0x00>{END_OF_DOCUMENT_PIECE}",
    "emoji with joiners": "👩‍👩‍👧 🇩🇪 👍🏽",
    "combining": "e\u0301 é \u1e9b\u0323",
    "compatibility forms": "\ufb01 \uff21 \u00b2 \u2460",
    "exotic blanks": "\u00a0\u3000\u200b\u2028\x85\ufeff",
    "scripts": "日本語 עברית عربى ไทย हिन्दी",
    "noncharacters": "\uffff\ufffd\U0010ffff\U0010fffe ▁ \U0010ffff",
    "controls": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "long line": "ab cd " * 100_000,
    "long without blank": "é" * 50_000,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_text_comes_back(tokenizer, name):
    text = ODD_TEXTS[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert tokenizer.piece_bytes()[ids].sum() == len(text.encode())
    assert b"".join(tokenizer.pieces[token] for token in ids) == text.encode()


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("▁ \n\t\r\0⁇<>"), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes()[ids].sum() == len(text.encode())


def test_newline_is_always_one_piece(tokenizer):
    newline = tokenizer.encode("\n").tolist()
    assert len(newline) == 1
    assert tokenizer.encode("a\n\n b\n").tolist().count(newline[0]) == 3


def test_a_batch_equals_one_by_one(tokenizer):
    batch = list(ODD_TEXTS.values())
    alone = [tokenizer.encode(text).tolist() for text in batch]
    assert [ids.tolist() for ids in tokenizer.encode_batch(batch)] == alone
    assert tokenizer.encode_batch([]) == []


def test_a_long_document_is_encoded_as_if_it_were_not_cut(tokenizer):
    draw = random.Random(3)
    text = "".join(draw.choice(["the ", "of four", "\n", "  ", "é", "\n\n"]) for _ in range(200_000))
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert len(tokenizer._cut(text)) > 1
    assert tokenizer.encode(text).tolist() == reference.encode(text)


@pytest.mark.parametrize("vocab_size", [320, 500])
def test_size_is_exact_and_training_repeats_itself(vocab_size):
    first = train_tokenizer(LINES, vocab_size)
    assert first == train_tokenizer(LINES, vocab_size)
    made = SentencePieceTokenizer(first)
    assert made.vocab_size == len(made.piece_bytes()) == vocab_size
    assert 0 <= made.end_of_document < vocab_size


@pytest.mark.parametrize(
    ("lines", "vocab_size", "message"),
    [
        ([], 400, "no text to train"),
        (["\0\0"], 400, "no text to train"),
        (["abc"], 400, r"too large .* at most \d+"),
        (["".join(map(chr, range(0x4E00, 0x4E00 + 500)))], 400, r"too small .* at least 759"),
        (LINES, 0, "out of range"),
        (LINES, 2**31, "out of range"),
    ],
    ids=["no line", "only NUL", "short text", "many characters", "zero", "huge"],
)
def test_a_size_that_does_not_fit_the_text_is_refused(lines, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(lines, vocab_size)


def foreign_model(**changes) -> bytes:
    """A model as others train them: newline in no piece of its own."""
    model = io.BytesIO()
    settings = {
        "model_type": "unigram",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **{**settings, **changes}
    )
    return model.getvalue()


@pytest.mark.parametrize("prefix", [True, False], ids=["LLaMA's prefix", "no prefix"])
def test_a_lossless_model_made_elsewhere_is_accepted(prefix):
    given_model = SentencePieceTokenizer(foreign_model(add_dummy_prefix=prefix))
    for text in ODD_TEXTS.values():
        assert given_model.decode(given_model.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"byte_fallback": False, "vocab_size": 80}, "0 of 256 byte pieces"),
        ({"eos_id": -1}, "no end-of-document id"),
    ],
    ids=["normalising", "removing blanks", "no bytes", "no end"],
)
def test_a_model_that_loses_text_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SentencePieceTokenizer(foreign_model(**changes))


def test_files_that_are_no_model_are_refused(tokenizer, tmp_path):
    cut = tokenizer.model[: len(tokenizer.model) // 2]
    # No UTF-8, in the name of a byte and in an ordinary piece.
    bad_byte = tokenizer.model.replace(b"<0x35>", b"<\xdex35>")
    bad_piece = tokenizer.model.replace("\u2581a".encode(), b"\xff\xff\xff\xff")
    assert tokenizer.model not in (bad_byte, bad_piece)
    for number, content in enumerate([b"", b"not a model", b"\0" * 100, cut, bad_byte, bad_piece]):
        path = tmp_path / f"{number}.model"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{number}.model"):
            load_tokenizer(path)
    with pytest.raises(UserError, match="cannot read tokenizer"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(UserError, match=r"holds no tokenizer: tokenizer\.json, tokenizer\.model, or vocab\.json with"):
        load_tokenizer(tmp_path)
