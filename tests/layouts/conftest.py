"""The corpus of the small runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import small_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.getbasetemp())
