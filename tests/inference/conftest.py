"""A finished run, and small models with a tokenizer in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from slope_dist.data.json_tokenizer import JsonTokenizer
from slope_dist.data.sentencepiece_model import SentencePieceTokenizer, train_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.inference import InferenceModel
from tests.distributed import run_ranks
from tests.export.models import random_stored
from tests.runs import small_corpus, train, write_config

ROOT = Path(__file__).parents[2]
TEXTS = [
    "the sparse weight is kept in groups of four and two of them stay while the others go",
    "How many of the four stay? Two of them do.\n\tWhich ones? é, ü and 日本語 \U0001f600",
]

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose context is 64; its adapters have joined, and its last evaluation read the whole split."""
    folder = tmp_path_factory.mktemp("inference")
    changes = {"model__sequence_length": 64, "evaluation__samples": None, "training__steps": 6}
    run_ranks(train, 1, str(write_config(folder, corpus, **changes)))
    return folder / "run"


@pytest.fixture(scope="session")
def tokenizer() -> JsonTokenizer:
    """Byte-level pairs, about 350 ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return JsonTokenizer(made.to_str().encode())


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return SentencePieceTokenizer(train_tokenizer("\n".join(TEXTS).split("\n"), 300))


@pytest.fixture(scope="session")
def model(tokenizer: JsonTokenizer) -> InferenceModel:
    """LLaMA with adapters and a tokenizer; its context is 80."""
    return InferenceModel(random_stored("llama", adapters=True, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer))


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Main]:
    """Gives, for a program in tools/, what runs it: exit code, stdout and stderr."""

    def of(name: str) -> Main:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def run(*arguments: object) -> tuple[int, str, str]:
            capsys.readouterr()
            code = module.main([str(argument) for argument in arguments])
            output, errors = capsys.readouterr()
            assert "Traceback" not in errors
            return code, output, errors

        return run

    return of
