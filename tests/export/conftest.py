"""Folders of Hugging Face's form, made once and copied by tests that damage them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.export.hugging_face import exported
from tests.export.models import random_stored


@pytest.fixture(scope="session")
def hugging_face_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family, with adapters."""
    made = {}
    for form in ("opt", "opt 350M", "gpt2", "llama", "llama scaled", "mistral"):
        made[form] = tmp_path_factory.mktemp("written") / "hf"
        exported(random_stored(form, adapters=True), made[form])
    return made


@pytest.fixture
def copy(hugging_face_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of one's own of a form, to damage."""

    def copied(form: str) -> Path:
        return Path(shutil.copytree(hugging_face_folders[form], tmp_path / "copy"))

    return copied
