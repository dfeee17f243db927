"""Claim: a tokenizer.json, or GPT-2's pair of files, gives the ids that transformers gives and loses no text, and one
that would lose some, or whose end of document is not known, is refused in a line.

Differences from transformers, on purpose: the name of a special token is only text, and U+2581 is not a space.

    python -m pytest tests/data/test_json_tokenizer.py
"""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from slope_dist.data.corpus import Corpus
from slope_dist.data.json_tokenizer import JsonTokenizer, of_vocabulary
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.prepare import prepare
from slope_dist.errors import UserError

END = "<|endoftext|>"
TEXTS = [
    "the sparse weight is kept in groups of four\n\n    and two of them stay",
    "  blanks  \t tabs\r\n",
    "I'll say it's 2024, won't I? 3.14e-5",
    "é e\u0301 \ufb01 \uff21 日本語 עברית ไทย 👩\u200d👧 \u00a0\u3000\u200b",
    "\0\x01\x7f\x85\ufeff\uffff\U0010ffff",
    "x" * 3000,
    "",
    " ",
]
NAMES = f"a{END}b</s><s><unk><0x0A>"


def byte_level(special=(END,), **changes) -> tokenizers.Tokenizer:
    """GPT-2's kind, of about 400 ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("add_prefix_space", False))
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


def byte_fallback(**changes) -> tokenizers.Tokenizer:
    """LLaMA's kind: U+2581 for a space, one put before the text, bytes where there is no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TEXTS[:3] * 3, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    for piece in sorted(model["vocab"], key=model["vocab"].get):
        vocabulary.setdefault(piece, len(vocabulary))
    made = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=changes.get("byte_fallback", True),
        )
    )
    made.add_special_tokens(pieces[:3])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # What puts a <s> before each text elsewhere, and here nothing.
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


MAKERS = {"byte-level": byte_level, "byte fallback": byte_fallback}


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def ours(kind):
    return JsonTokenizer(MAKERS[kind]().to_str().encode())


@pytest.fixture(scope="module")
def both():
    return {kind: JsonTokenizer(make().to_str().encode()) for kind, make in MAKERS.items()}


def reads_back(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.spells(ids, text.encode())
    assert not tokenizer.spells(ids, text.encode() + b"x")
    assert tokenizer.end_of_document not in ids
    assert tokenizer.piece_bytes()[ids].sum() - len(text.encode()) in (0, 1)


def test_ids_are_those_of_transformers(kind, ours):
    theirs = PreTrainedTokenizerFast(tokenizer_object=MAKERS[kind]())
    draw = random.Random(0)
    texts = TEXTS + ["".join(draw.choices("".join(TEXTS), k=200)) for _ in range(100)]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("text", [*TEXTS, NAMES, "\u2581a \u2581\u2581 b\u2581"])
def test_odd_text_comes_back(ours, text):
    reads_back(ours, text)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2581 \n\t\r\0<>|"), max_size=60),
    which=st.sampled_from(list(MAKERS)),
)
def test_any_text_comes_back(both, text, which):
    reads_back(both[which], text)


def test_what_a_file_does_to_texts_is_left_out():
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    text = TEXTS[0]
    tokenizer = JsonTokenizer(made.to_str().encode())
    assert tokenizer.encode(text).tolist() == JsonTokenizer(byte_level().to_str().encode()).encode(text).tolist()


@pytest.fixture
def pair(tmp_path):
    """GPT-2's two files."""
    byte_level().model.save(str(tmp_path))
    return tmp_path


def test_gpt2s_pair_gives_gpt2s_ids(pair):
    tokenizer = load_tokenizer(pair)
    theirs = GPT2TokenizerFast(vocab=str(pair / "vocab.json"), merges=str(pair / "merges.txt"))
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == theirs.encode(text)
    assert tokenizer.end_of_document == theirs.eos_token_id
    reads_back(tokenizer, NAMES)
    again = load_tokenizer(pair / "vocab.json")
    assert again.model == tokenizer.model and again.sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "#version: 0.2\nt h e\n", r"merges\.txt:2 is no pair"),
        ("merges.txt", "q \u0142\n", r"merges\.txt:1 is no pair"),
        ("vocab.json", "{", r"vocab\.json is not JSON"),
        ("vocab.json", "[]", r"vocab\.json is not a JSON object"),
        ("vocab.json", '{"a": 1, "b": 1}', r"a token has no id of its own"),
        ("vocab.json", '{"a": "1"}', r"a token has no id of its own"),
    ],
)
def test_a_damaged_pair_is_refused(pair, name, content, message):
    (pair / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(pair)


def test_a_vocabulary_without_every_byte_is_refused(pair):
    ids = json.loads((pair / "vocab.json").read_text())
    kept = {token: number for token, number in ids.items() if token not in "xyz"}
    with pytest.raises(UserError, match="has 253 of 256 bytes"):
        JsonTokenizer(of_vocabulary(json.dumps(kept).encode(), b"", path=pair))


def test_the_end_is_found_named_or_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    both = byte_level((END, "</s>", "<|other|>"))
    both.save(str(path))
    with pytest.raises(UserError, match=re.escape(f"{END} and </s>, each of which may end a document; name")):
        load_tokenizer(path)
    assert load_tokenizer(path, "<|other|>").end_of_document == both.token_to_id("<|other|>")
    with pytest.raises(UserError, match="no special token 'the' to end a document with; its special tokens are"):
        load_tokenizer(path, "the")
    for eos in ("</s>", {"content": "</s>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(tmp_path).end_of_document == both.token_to_id("</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "absent"}')
    with pytest.raises(UserError, match="no special token 'absent'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    byte_level(()).save(str(path))
    with pytest.raises(UserError, match=r"no known token to end a document; name .* .it has no special tokens"):
        load_tokenizer(path)


def lowercase() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens([END])
    return made


def with_normalizer(normalizer: object) -> tokenizers.Tokenizer:
    made = byte_level()
    made.normalizer = normalizer
    return made


def with_dropout() -> tokenizers.Tokenizer:
    made = byte_level()
    made.model.dropout = 0.5
    return made


LOSSY = {
    "BERT": (lowercase, "marks the parts of words"),
    "lower case": (lambda: with_normalizer(normalizers.Lowercase()), "its normalizer is Lowercase"),
    "compositions": (lambda: with_normalizer(normalizers.NFC()), "its normalizer is NFC"),
    "a blank put before": (lambda: byte_level(add_prefix_space=True), "changes text"),
    "no bytes": (lambda: byte_fallback(byte_fallback=False), "changes text"),
    "dropout": (with_dropout, "cuts text at random"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused(name):
    make, message = LOSSY[name]
    with pytest.raises(UserError, match=message) as caught:
        JsonTokenizer(make().to_str().encode())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_paths_that_cannot_be_are_refused(name):
    with pytest.raises(UserError, match="cannot read tokenizer"):
        load_tokenizer(name)


def test_half_a_surrogate_pair_and_odd_decoders_are_refused(pair):
    path = pair / "vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps(vocabulary | {"\ud800": len(vocabulary)}))
    with pytest.raises(UserError, match="half a surrogate pair"):
        load_tokenizer(pair)
    path.write_text(json.dumps(vocabulary))
    description = json.loads(load_tokenizer(pair).model)
    for decoder in ({"type": "Sequence", "decoders": "x"}, {"type": "Sequence", "decoders": {"a": 1}}, [1], 3):
        (pair / "tokenizer.json").write_text(json.dumps(description | {"decoder": decoder}))
        with pytest.raises(UserError):
            load_tokenizer(pair)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    whole = byte_level().to_str().encode()
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"[]", b"5", whole[: len(whole) // 2], b"[" * 200_000, b'{"model": {"type": "X"}}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


ODD_VALUES = (None, 0, -1, "", "x", [], {}, 2**31, 1.5, True, [None], {"type": "Sequence"})


def places(part: object, place: tuple = ()) -> list[tuple]:
    """Where a value may be put in a tokenizer.json, but for single tokens."""
    inner = part.items() if isinstance(part, dict) else enumerate(part[:3]) if isinstance(part, list) else ()
    found = [place] if place else []
    if place[-1:] in (("vocab",), ("merges",)):
        return found
    return found + [deeper for name, value in inner for deeper in places(value, (*place, name))]


@pytest.mark.parametrize("kind", MAKERS)
def test_odd_values_are_refused_or_loaded(kind, capfd):
    """Among them those at which the library would panic, which is told on stderr, or end the process."""
    whole = MAKERS[kind]().to_str()
    draw = random.Random(6)
    everywhere = [(place, value) for place in places(json.loads(whole)) for value in ODD_VALUES]
    chosen = [*draw.sample(everywhere, 200), (("model", "continuing_subword_prefix"), "x")]
    for place, value in chosen:
        damaged = part = json.loads(whole)
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = value
        try:
            reads_back(JsonTokenizer(json.dumps(damaged).encode()), TEXTS[0])
        except UserError as error:
            assert "\n" not in str(error)
    assert capfd.readouterr().err == ""


def test_damaged_files_are_refused_or_loaded(capfd):
    whole = byte_level().to_str().encode()
    draw = random.Random(5)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 2, 8])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            reads_back(JsonTokenizer(bytes(damaged)), TEXTS[0])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50
    assert capfd.readouterr().err == "", "the library did not panic"


def test_a_corpus_keeps_the_tokenizer_and_its_end(make_source, make_texts, tmp_path):
    (tmp_path / "given").mkdir()
    byte_level((END, "</s>")).save(str(tmp_path / "given" / "tokenizer.json"))
    texts = [*make_texts(30), NAMES]
    folder = tmp_path / "corpus"
    manifest = prepare(
        make_source(texts),
        folder,
        vocab_size=None,
        valid_fraction=0.3,
        seed=1,
        tokenizer=tmp_path / "given",
        end_of_document="</s>",
        workers=2,
    )
    assert manifest["tokenizer"] == "tokenizer.json"
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "given" / "tokenizer.json").read_bytes()
    corpora = [Corpus.open(folder, split, 500) for split in ("train", "valid")]
    found = []
    for corpus in corpora:
        assert corpus.end_of_document == manifest["end_of_document"] == 1
        ids = corpus.tokens(0, corpus.num_tokens)
        ends = np.flatnonzero(ids == 1)
        found += [corpus.tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)]
        assert corpus.tokenizer.piece_bytes()[ids].sum() == corpus.text_bytes
    assert sorted(found) == sorted(texts)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    with pytest.raises(UserError, match="has the end-of-document id 0, the manifest 1"):
        Corpus.open(folder, "train", 500)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"has both tokenizer\.json and tokenizer\.model"):
        Corpus.open(folder, "train", 500)
