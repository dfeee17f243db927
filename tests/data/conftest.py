"""A small tokenizer and a small corpus, made once by the code under test and copied by tests that damage them."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slope_dist.data.prepare import prepare
from slope_dist.data.readers import Document
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.data.sources import Source

VOCAB_SIZE = 400
WORDS = re.findall(r"\w+", "the sparse weight is kept in groups of four and two of them stay while others go")


def _make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(
            "    " * draw.randrange(3) + " ".join(draw.choices(WORDS, k=draw.randrange(1, 12))) + "\n"
            for _ in range(draw.randrange(1, 30))
        )
        for _ in range(count)
    ]


def _make_source(texts: list[str]) -> Source:
    def documents() -> Iterator[tuple[Document, int]]:
        for number, text in enumerate(texts):
            yield Document(name=f"document {number}", text=text), len(text.encode())

    return Source(description={"kind": "test"}, num_bytes=sum(len(t.encode()) for t in texts), documents=documents)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Shells start jobs in the background with Ctrl-C ignored, and every program below inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., list[str]]:
    return _make_texts


@pytest.fixture(scope="session")
def make_source() -> Callable[[list[str]], Source]:
    return _make_source


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """60 documents; one without text, one with characters that no piece has."""
    made = _make_texts(60)
    made[7] = ""
    made[8] = "▁ x\r\n\t\0 é \U0001f600\n" * 5
    return made


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer("\n".join(_make_texts(60)).split("\n"), VOCAB_SIZE))


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "given.model"
    path.write_bytes(tokenizer.model)
    return path


@pytest.fixture(scope="session")
def whole_corpus(texts: list[str], tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "whole"
    prepare(_make_source(texts), folder, vocab_size=None, valid_fraction=0.2, seed=1, tokenizer=tokenizer_file)
    return folder


@pytest.fixture
def corpus_folder(whole_corpus: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole_corpus, tmp_path / "corpus"))
