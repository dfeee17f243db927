"""The corpus of the small runs, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from tests.runs import small_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus)
