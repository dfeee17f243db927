"""Converting a checkpoint holds a few layers in memory, whatever the form, and loading one holds the model once.

What is measured is the most anonymous memory of a process, of which the pages of mapped files are no part. The model is
of the family whose files are furthest from ours: GPT-2's weights are transposed, three of them in one.

Run: pytest tests/export/test_memory.py
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.benchmark import memory
from slope_dist.benchmark.inference import RandomModel
from slope_dist.checkpoint import save
from slope_dist.config import load_config
from slope_dist.export.exporting import FORMS, convert
from slope_dist.export.opening import open_model
from slope_dist.export.options import Options
from slope_dist.inference import load_model
from slope_dist.parallel.fragments import Fragment, whole
from slope_dist.transfer import Transfer
from tests.distributed import ROOT, run_ranks

pytestmark = pytest.mark.skipif(
    not memory.can_measure(torch.device("cpu")), reason="this system does not tell a process its memory"
)

HIDDEN, BLOCKS = 384, 24
BLOCK_BYTES = 2 * 12 * HIDDEN**2
"""Of a block's weights, dense in bf16."""

MOST = 6.0
"""Blocks that a conversion may hold: those of a layer before and after, in fp32 where something is computed."""


def checkpoint_of(place: Path, blocks: int) -> Path:
    sections = json.loads((ROOT / "configs" / "tiny.json").read_text())
    sections["model"] = {
        "family": "gpt2",
        "hidden_size": HIDDEN,
        "ffn_size": 4 * HIDDEN,
        "num_layers": blocks,
        "num_heads": 8,
        "vocab_size": 1000,
        "sequence_length": 64,
    }
    sections["adapters"] = {"fraction": 0.1, "rank": 8}
    (place / "config.json").write_text(json.dumps(sections))
    config = load_config(place / "config.json")
    stored = RandomModel(config, torch.bfloat16)
    return save(place, blocks, fragments_of(stored), {}, {}, config.model_dump(mode="json")).path


def fragments_of(stored: RandomModel) -> Iterator[Fragment]:
    for name, shape in stored.shapes.items():
        tensor = stored.read(name).flatten()
        kind: Any = "metadata" if name.endswith(".weight.indices") else "weight"
        yield Fragment(name, kind, shape, whole(shape), 0, len(tensor), tensor)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of one block, and of many."""
    place = tmp_path_factory.mktemp("checkpoints")
    return str(checkpoint_of(place, 1)), str(checkpoint_of(place, BLOCKS))


def grown(work: Callable[[str], object], small: str, large: str) -> float:
    """By how many blocks the memory grows at most while a large model is worked on, after a small one was."""
    # Memory that is freed is given back at once, so that what is counted is what is held (M_MMAP_THRESHOLD).
    assert ctypes.CDLL(None).mallopt(-3, 2**16) == 1
    work(small)
    gc.collect()
    memory.return_free_heap()
    before = memory.anonymous_bytes()
    with memory.AnonymousPeak(0.0005) as peak:
        work(large)
    return (peak.bytes - before) / BLOCK_BYTES


def converting(small: str, large: str, place: str, form: str, merged: bool) -> float:
    options = Options(tokenizer=False, merge_adapters=merged)

    def work(source: str) -> None:
        target = Path(place, Path(source).name)
        convert(open_model(Path(source)), form, target, options, Transfer(), Transfer())

    return grown(work, small, large)


def holding(small: str, large: str) -> float:
    """All linear layers at one time, as a converter that does not stream would."""

    def work(source: str) -> list[torch.Tensor]:
        stored = open_model(Path(source))
        return [stored.dense(name) for name in stored.linears]

    return grown(work, small, large)


def loading(small: str, large: str) -> tuple[float, float]:
    sizes = []

    def work(source: str) -> None:
        sizes.append(load_model(Path(source)).weight_bytes / BLOCK_BYTES)

    return grown(work, small, large), sizes[-1]


@pytest.mark.parametrize(("form", "merged"), [*((form, False) for form in FORMS), ("hf", True)])
def test_a_conversion_holds_a_few_layers(checkpoints: tuple[str, str], tmp_path: Path, form: str, merged: bool) -> None:
    (blocks,) = run_ranks(converting, 1, *checkpoints, str(tmp_path), form, merged)
    assert blocks < MOST <= BLOCKS / 4


def test_the_whole_model_would_be_seen(checkpoints: tuple[str, str]) -> None:
    (blocks,) = run_ranks(holding, 1, *checkpoints)
    assert BLOCKS < blocks < BLOCKS + MOST


def test_loading_holds_the_model_once(checkpoints: tuple[str, str]) -> None:
    ((blocks, size),) = run_ranks(loading, 1, *checkpoints)
    assert 0.5 * BLOCKS < size < blocks < size + MOST
