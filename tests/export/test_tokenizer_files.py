"""The files written for transformers give, through AutoTokenizer, the ids and texts of the tokenizer they were made of:
of a SentencePiece model trained here or elsewhere, of a tokenizer.json, and of GPT-2's pair.

Run: pytest tests/export/test_tokenizer_files.py
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from slope_dist.config.model import ModelConfig
from slope_dist.data.json_tokenizer import JsonTokenizer
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.export import tokenizer_files
from slope_dist.export.tokenizer_files import hugging_face_files, lines_about, special_ids, tokenizer_in

END = "<|endoftext|>"
LINES = [
    f"    if self.value[{number % 7}] == {number}:  # the sparse 'é' of {number * 37 % 101}\t\x07ﬁ"
    for number in range(300)
]
MODEL = ModelConfig(
    family="opt", hidden_size=32, num_layers=1, num_heads=2, ffn_size=64, vocab_size=512, sequence_length=48
)
LLAMA = "tokenizer.json of LLaMA's kind"
FAMILIES = ("opt", "gpt2", "llama", "mistral")


def foreign(**changes: object) -> SentencePieceTokenizer:
    """A model as others train them."""
    model = io.BytesIO()
    usual = {
        "model_type": "bpe",
        "vocab_size": 350,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **(usual | changes))
    return SentencePieceTokenizer(model.getvalue())


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind, with what a file may ask for beside: a token around each text, a length, and padding."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(LINES, trainer)
    return made


def with_template() -> JsonTokenizer:
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(3)
    made.enable_padding(length=50)
    return JsonTokenizer(made.to_str().encode())


def of_llama() -> JsonTokenizer:
    """Bytes as a fallback, and U+2581 for a space."""
    made = hugging_face_files(SentencePieceTokenizer(train_tokenizer(LINES, 350)), MODEL)["tokenizer.json"]
    description = json.loads(made)
    model = description["model"]
    model["vocab"] = {piece.replace(" ", "\u2581"): number for piece, number in model["vocab"].items()}
    model["merges"] = [[part.replace(" ", "\u2581") for part in pair] for pair in model["merges"]]
    description["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    description["decoder"]["decoders"] = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return JsonTokenizer(json.dumps(description).encode())


def gpt2_pair(folder: Path) -> Tokenizer:
    made = byte_level()
    made.model.save(str(folder))
    return load_tokenizer(folder)


MAKERS: dict[str, Callable[[Path], Tokenizer]] = {
    "trained here": lambda folder: SentencePieceTokenizer(train_tokenizer(LINES, 350)),
    "BPE with LLaMA's prefix": lambda folder: foreign(user_defined_symbols=["\n"]),
    "BPE with given words": lambda folder: foreign(
        user_defined_symbols=["self", "\n\n", "  ", "if self"], add_dummy_prefix=False
    ),
    "unigram": lambda folder: foreign(model_type="unigram"),
    "tokenizer.json": lambda folder: with_template(),
    LLAMA: lambda folder: of_llama(),
    "GPT-2's pair": gpt2_pair,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Path]]:
    """Of each kind the tokenizer, and a folder with its files."""
    made = {}
    for kind, make in MAKERS.items():
        tokenizer = make(tmp_path_factory.mktemp("given"))
        made[kind] = tokenizer, tmp_path_factory.mktemp("written")
        for name, content in hugging_face_files(tokenizer, MODEL).items():
            (made[kind][1] / name).write_bytes(content)
    return made


@pytest.fixture(scope="module")
def both(folders) -> dict[str, tuple[Tokenizer, transformers.PreTrainedTokenizerBase]]:
    return {kind: (ours, transformers.AutoTokenizer.from_pretrained(path)) for kind, (ours, path) in folders.items()}


def texts_of(tokenizer: Tokenizer) -> Iterator[str]:
    """Two thousand: pieces, lines, names of special tokens, blanks, and characters from everywhere."""
    draw = random.Random(7)
    decoded = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size)]
    pieces = [text for text in decoded if text and "\ufffd" not in text]
    parts = [*pieces, *LINES, END, "</s>", "<unk>", "<s>", "<0x0A>", "\n", "  ", "\u2581", "\r\n", "\0", "\U0001f600"]
    odd = [*map(chr, range(0x180)), *"\u2581\u3000\u200b\ufeff\uffff\U0010ffff\u0301日本עב"]
    yield from ("", " ", "\n", "\u2581", END, f"{END}{END}a{END} ", *pieces)
    for number in range(2000):
        yield "".join(draw.choices(odd if number % 3 == 0 else parts, k=draw.choice((1, 2, 3, 5, 20))))


def check(tokenizer: Tokenizer, theirs: transformers.PreTrainedTokenizerBase, texts: list[str]) -> None:
    if theirs.encode("\u2581") == theirs.encode(" "):
        # The one difference, and with `LLAMA` only.
        texts = [text.replace("\u2581", "_") for text in texts]
    found = theirs(texts)["input_ids"]
    for text, ours, ids in zip(texts, tokenizer.encode_batch(texts), found, strict=True):
        assert ids == ours.tolist(), text
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert all(np.array_equal(theirs.encode(text), tokenizer.encode(text)) for text in texts[:100])


@pytest.mark.parametrize("kind", MAKERS)
def test_ids_and_texts_are_ours(both, kind):
    check(*both[kind], list(texts_of(both[kind][0])))


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2581 \n\t\r\0<>|/s"), max_size=60),
    kind=st.sampled_from(list(MAKERS)),
)
def test_any_text_has_our_ids(both, text, kind):
    check(*both[kind], [text])


@pytest.mark.parametrize("kind", MAKERS)
def test_the_end_of_a_document_and_the_length_are_known(both, kind):
    ours, theirs = both[kind]
    assert theirs.eos_token_id == ours.end_of_document == special_ids(ours)["eos_token_id"]
    assert theirs.convert_tokens_to_ids(theirs.eos_token) == ours.end_of_document
    assert theirs.model_max_length == MODEL.sequence_length
    assert len(theirs) == ours.vocab_size
    # The name of the end is text, and the end is none.
    assert ours.end_of_document not in theirs.encode(f"a{theirs.eos_token}b")
    assert theirs.decode([ours.end_of_document], skip_special_tokens=True) == ""


@pytest.mark.parametrize("kind", MAKERS)
def test_only_a_given_json_that_has_it_for_a_space_reads_u2581_as_one(both, kind):
    ours, theirs = both[kind]
    same = theirs.encode("a\u2581b") == ours.encode("a\u2581b").tolist()
    assert same == (kind != LLAMA)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["trained here", "GPT-2's pair"])
def test_a_model_beside_them_changes_nothing(folders, kind, family, tmp_path):
    ours, written = folders[kind]
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "transformers_version": "5.23.0"}))
    check(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), [*LINES[:50], END, "\n", " x", ""])


@pytest.mark.parametrize("kind", MAKERS)
def test_the_folder_gives_the_tokenizer_back(folders, kind):
    ours, written = folders[kind]
    again = tokenizer_in(written)
    assert type(again) is type(ours) and again.sha256 == ours.sha256
    assert again.end_of_document == ours.end_of_document
    has_two = (written / tokenizer_files.ORIGINAL).exists()
    assert has_two == (kind == "tokenizer.json")


def test_a_folder_of_two_tokenizers_has_that_of_the_json(folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["GPT-2's pair"][1] / name).read_bytes())
    for content in (folders["trained here"][0].model, b"no model at all"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        assert tokenizer_in(tmp_path).sha256 == folders["GPT-2's pair"][0].sha256


def test_where_no_json_gives_the_ids_there_is_none_and_it_is_said(tmp_path):
    """Words given beside a prefix; characters alone, which no kind of tokenizer.json cuts a text into."""
    for tokenizer in (foreign(user_defined_symbols=["self"]), foreign(model_type="char", vocab_size=310)):
        files = hugging_face_files(tokenizer, MODEL)
        assert set(files) == {"tokenizer.model", "tokenizer_config.json"}
        (line,) = lines_about(files)
        assert "read tokenizer.model with sentencepiece" in line and "\n" not in line
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        theirs = transformers.SentencePieceBackend.from_pretrained(tmp_path)
        assert [theirs.encode(text) for text in LINES] == [ids.tolist() for ids in tokenizer.encode_batch(LINES)]
        assert tokenizer_in(tmp_path).sha256 == tokenizer.sha256


def test_a_json_that_is_wrong_is_seen_to_be(monkeypatch):
    """One merge out of its place among hundreds."""
    tokenizer = SentencePieceTokenizer(train_tokenizer(LINES, 350))
    assert "tokenizer.json" in hugging_face_files(tokenizer, MODEL)
    merges = tokenizer_files._merges

    def swapped(*arguments: object) -> list[list[str]]:
        first, second, *rest = merges(*arguments)
        return [*rest, first, second]

    monkeypatch.setattr(tokenizer_files, "_merges", swapped)
    assert "tokenizer.json" not in hugging_face_files(tokenizer, MODEL)
