"""Fixtures of every test: a fixed random stream, one thread; where asked for, scratch memory full of NaN, a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from slope_dist.data.tokenizer import Tokenizer

if not torch.cuda.is_available():
    # Before anything imports triton, as other libraries do: its own functions, too, are made for one or the other.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def fixed_randomness() -> Iterator[None]:
    """Each test starts from the same torch stream and one thread, and leaves threads and default dtype alone."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(20240525)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def nan_scratch() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (the largest value for integers), so reading unwritten memory shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # With torch.utils.deterministic.fill_uninitialized_memory, on by default, this fills what it hands out.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the small runs."""
    from tests.runs import small_corpus

    return small_corpus(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    """Of that corpus."""
    from slope_dist.data.load_tokenizer import load_tokenizer

    return load_tokenizer(corpus)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest in one file: at the end one worker would be alone with it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
