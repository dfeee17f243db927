"""The files by which Hugging Face's libraries give the ids that a model was trained on.

Two things that they do otherwise with most tokenizers are asked for here: the name of a special token in a text is only
text (`split_special_tokens`), and nothing is put around a text. One difference stays, with a tokenizer.json that was
given to us and writes spaces as U+2581: theirs reads that character in a text as a space, ours spells it in bytes.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slope_dist.config.model import ModelConfig
from slope_dist.data import json_tokenizer, sentencepiece_model
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer
from slope_dist.data.tokenizer import PROBE, SPACE_MARK, Tokenizer
from slope_dist.errors import UserError

ORIGINAL = "tokenizer.original.json"
"""A tokenizer.json as it was given, where another had to be written."""

_PAIRS, _LONG = 20_000, 100


def hugging_face_files(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, bytes]:
    """What `transformers.AutoTokenizer.from_pretrained` needs in a folder to give the ids of `tokenizer`, by name.

    Of a SentencePiece model: its own file, and a tokenizer.json made of it, which was seen to give the same ids. Where
    none does, there is none, and `lines_about` says what to use instead. A tokenizer.json is as it was given, or, where
    it would put tokens around a text, cut it off or pad it, without that and beside the one that was given.
    """
    files = tokenizer.files()
    kind = "PreTrainedTokenizerFast"
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = _proto(tokenizer)
        end = proto.pieces[tokenizer.end_of_document].piece
        made = _json_of(proto)
        if made is not None and _gives_the_same(made, tokenizer, proto):
            files[json_tokenizer.FILE] = made
        else:
            kind = "SentencePieceBackend"
    else:
        assert isinstance(tokenizer, json_tokenizer.JsonTokenizer)
        end = tokenizer.end
        files[json_tokenizer.FILE] = _plain(tokenizer.model)
        if files[json_tokenizer.FILE] != tokenizer.model:
            files[ORIGINAL] = tokenizer.model
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "model_max_length": model.sequence_length,
        "split_special_tokens": True,
        "tokenizer_class": kind,
    }
    return files | {json_tokenizer.CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"}


def lines_about(files: dict[str, bytes]) -> list[str]:
    """What the user of `hugging_face_files` should know; nothing, mostly."""
    if json_tokenizer.FILE in files:
        return []
    return [
        f"no {json_tokenizer.FILE} gives the ids of this SentencePiece model: read {sentencepiece_model.FILE} with "
        "sentencepiece, or with transformers.SentencePieceBackend.from_pretrained; other loaders may give other ids"
    ]


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids that config.json and generation_config.json name.

    A document begins where another ended, so what ends a document also begins a text. Nothing pads.
    """
    end = tokenizer.end_of_document
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer of a folder such as Hugging Face's models have.

    Of what `hugging_face_files` wrote it is the tokenizer that the model was trained with, by its hash too: where a
    SentencePiece model, or `ORIGINAL`, has the same pieces as the tokenizer.json beside it, it is that one.

    Raises:
        UserError: there is none, or it is of no use here.
    """
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer
    for name in (sentencepiece_model.FILE, ORIGINAL):
        try:
            original = load_tokenizer(folder / name)
        except UserError:
            # There is none, mostly; or, under the first name, one of the other kinds that others have.
            continue
        if original.same_ids(tokenizer):
            return original
    return tokenizer


def _plain(given: bytes) -> bytes:
    """A tokenizer.json without what it does around the ids of a text."""
    description = json.loads(given)
    plain = description | {"truncation": None, "padding": None}
    if (description.get("post_processor") or {}).get("type") != "ByteLevel":
        plain["post_processor"] = None
    changed = any(description.get(name) != plain[name] for name in ("truncation", "padding", "post_processor"))
    return json.dumps(plain, ensure_ascii=False, indent=1).encode() + b"\n" if changed else given


def _proto(tokenizer: SentencePieceTokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)


def _texts(proto: Any) -> list[str]:
    """What each piece is called in a tokenizer.json.

    With a space where SentencePiece has U+2581, this character in a text is one like others: it has no piece and is
    spelled in bytes, as it is in `SentencePieceTokenizer`.
    """
    return [p.piece.replace(SPACE_MARK, " ") if p.type in (p.NORMAL, p.USER_DEFINED) else p.piece for p in proto.pieces]


def _json_of(proto: Any) -> bytes | None:
    """A tokenizer.json that should give the ids of a SentencePiece model; None where there can be none."""
    pieces, texts = list(proto.pieces), _texts(proto)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    # The first is a table of what to replace; spaces that are no marks, or that are marks at the end of words, are not
    # written here.
    if normalizer.precompiled_charsmap or not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return None
    if len(set(texts)) < len(texts):
        return None
    # One with a space of its own is never found in a text, whose spaces are marks by then.
    given = {
        number: texts[number] for number, p in enumerate(pieces) if p.type == p.USER_DEFINED and " " not in p.piece
    }
    unknown = next((number for number, p in enumerate(pieces) if p.type == p.UNKNOWN), None)
    model: dict[str, object]
    cut = None
    if trainer.model_type == trainer.BPE:
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else texts[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(texts)},
            "merges": _merges(pieces, texts, list(given.values())),
        }
    elif trainer.model_type == trainer.UNIGRAM:
        # What a character without a piece costs follows there from the lowest score of all.
        lowest = min((p.score for p in pieces if p.type == p.NORMAL), default=0.0)
        scores = [p.score if p.type in (p.NORMAL, p.USER_DEFINED) else lowest for p in pieces]
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            "byte_fallback": True,
            "vocab": [[text, score] for text, score in zip(texts, scores, strict=True)],
        }
        # A text that spells the name of a byte would be that byte there, unless it is cut within.
        names = [p.piece for p in pieces if p.type not in (p.NORMAL, p.USER_DEFINED)]
        within = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        cut = {"type": "Split", "pattern": {"Regex": within}, "behavior": "MergedWithPrevious", "invert": False}
    else:
        return None
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normalizer.add_dummy_prefix else []
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": number not in given,
            }
            for number, (text, p) in enumerate(zip(texts, pieces, strict=True))
            # A single character that is given is an ordinary piece here: nothing is merged with it.
            if p.type in (p.CONTROL, p.UNKNOWN) or (number in given and len(text) > 1)
        ],
        "normalizer": {"type": "Prepend", "prepend": " "} if normalizer.add_dummy_prefix else None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model,
    }
    return json.dumps(description, ensure_ascii=False, indent=1).encode() + b"\n"


def _merges(pieces: list[Any], texts: list[str], given: list[str]) -> list[list[str]]:
    """Every two pieces that together are a piece, in the order in which SentencePiece would join them.

    It joins the neighbours of the best score, from the left, whichever two parts they are; here each pair has a place.
    """
    # What is given is cut out of a text first, so that no other piece with it inside ever comes about.
    outside = re.compile("|".join(map(re.escape, given))) if given else None
    normal = {
        text
        for text, p in zip(texts, pieces, strict=True)
        if p.type == p.NORMAL and not (outside and outside.search(text))
    }
    found = []
    for number, (text, p) in enumerate(zip(texts, pieces, strict=True)):
        for cut in range(len(text) - 1, 0, -1) if text in normal else ():
            if text[:cut] in normal and text[cut:] in normal:
                # In a run of one character, which is joined from the left, a longer part is before a shorter one.
                found.append((-p.score, number, -cut, [text[:cut], text[cut:]]))
    return [pair for *_, pair in sorted(found)]


def _gives_the_same(made: bytes, tokenizer: Tokenizer, proto: Any) -> bool:
    """Whether it gives the ids of `tokenizer` and their texts back, of pieces, pairs and longer texts."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(made.decode())
    # What `split_special_tokens` sets.
    theirs.encode_special_tokens = True
    texts = list(_probes(_texts(proto)))
    all_ours, all_theirs = tokenizer.encode_batch(texts), theirs.encode_batch_fast(texts)
    return all(
        found.ids == ours.tolist() and theirs.decode(found.ids) == text
        for text, ours, found in zip(texts, all_ours, all_theirs, strict=True)
    )


def _probes(pieces: list[str]) -> Iterator[str]:
    """Texts in which two ways of cutting would differ, the same ones each time."""
    yield ""
    yield PROBE
    yield from pieces
    for character in " \n\t\r.-=_a0e\u2581":
        for count in range(1, 40):
            yield character * count
            yield f"x{character * count}\n{character * count}y"
    draw = random.Random(0)
    for _ in range(_PAIRS):
        yield "".join(draw.choices(pieces, k=draw.choice((2, 2, 3))))
    odd = [chr(number) for number in range(0x250)] + list("\u2581\u3000\ufeff\uffff\U0001f600\U0010ffff\u0301\u65e5")
    for _ in range(_LONG):
        yield "".join(draw.choices(pieces, k=300))
        yield "".join(draw.choices(odd, k=300))
        yield "".join(draw.choices([*odd, *draw.choices(pieces, k=300)], k=300))
