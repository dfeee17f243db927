"""`tools/benchmark.py inference` measures the memory of a model in both forms, and sees that they are the same.

Run: pytest tests/benchmark/test_inference.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.benchmark import inference, memory
from slope_dist.benchmark.timing import WrongResultError
from slope_dist.config import Config, load_config
from slope_dist.models import family
from tests.benchmark.test_benchmark_tool import ROOT, benchmark

MIB = 2**20

pytestmark = pytest.mark.skipif(
    not memory.can_measure(torch.device("cpu")), reason="this system does not tell a process its memory"
)


def small_config(place: Path) -> Path:
    """The tiny config with 72 MiB of weights in linear layers."""
    sections = json.loads((ROOT / "configs" / "tiny.json").read_text())
    sections["model"] = {
        "family": "llama",
        "hidden_size": 512,
        "num_layers": 12,
        "num_heads": 8,
        "ffn_size": 1365 // 8 * 8,
        "vocab_size": 1000,
        "sequence_length": 64,
    }
    sections["adapters"] = {"fraction": 0.1, "rank": 8}
    path = place / "small.json"
    path.write_text(json.dumps(sections))
    return path


def linear_bytes(config: Config) -> tuple[int, int]:
    """Of dense weights, and of 2:4 ones with metadata and adapters where they are sparse, in bf16."""
    model = config.model
    hidden, ffn = model.hidden_size, model.ffn_size
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes = attention | {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    dense = compressed = 0
    for block in range(model.num_layers):
        for name, (rows, columns) in shapes.items():
            dense += 2 * rows * columns
            if f"model.layers.{block}.{name}" in family("llama").first_linears:
                compressed += 2 * rows * columns
            else:
                compressed += rows * columns + rows * columns // 8 + 2 * config.adapter_rank * (rows + columns)
    return dense, compressed


def test_both_forms_are_measured(tmp_path: Path) -> None:
    config, file = small_config(tmp_path), tmp_path / "inference.json"
    done = benchmark(
        *("inference", "--config", str(config), "--prompt", "8", "--seconds", "0", "--threads", "1"),
        *("--folder", str(tmp_path), "--output", str(file)),
    )
    assert done.returncode == 0, done.stderr
    assert "adapters of rank 8" in done.stdout.replace("\n", "")
    assert sorted(tmp_path.iterdir()) == sorted([config, file]), "models were removed"
    (row,) = json.loads(file.read_text())["rows"]
    assert row["config"] == "small" and row["dtype"] == "bfloat16"
    rivals, ratios = row["rivals"], row["ratios"]
    assert set(rivals) == set(inference.RIVALS)
    expected = dict(zip(inference.RIVALS, linear_bytes(load_config(config)), strict=True))
    for name, rival in rivals.items():
        assert rival["linear_bytes"] == expected[name]
        # Above the weights: what the library needs, once. Below: nothing is left out.
        assert 0 <= rival["resident_bytes"] - rival["weight_bytes"] < 40 * MIB
        assert rival["peak_bytes"] - rival["resident_bytes"] < 10 * MIB, "loading holds no more than the model"
        assert 0 <= rival["file_bytes"] - rival["weight_bytes"] < MIB
        assert min(rival[what] for what in ("load_seconds", "prompt_tokens_per_second", "tokens_per_second")) > 0
    assert ratios["linear_bytes"] == expected["compressed"] / expected["dense"] < 0.63
    saved = rivals["dense"]["resident_bytes"] - rivals["compressed"]["resident_bytes"]
    assert saved > 0.6 * (expected["dense"] - expected["compressed"])
    assert 0 < row["logits_difference"] < inference.BOUND


def test_two_that_are_not_the_same_model_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = iter([[1.0, 2.0, 3.0], [1.0, 2.0, -3.0]])

    def measured(path: Path, work: Any) -> dict[str, Any]:
        assert list(path.glob("*.safetensors"))
        return dict.fromkeys(inference.SIZES, 1) | {"logits": next(outputs)}

    monkeypatch.setattr(inference, "_measured", measured)
    config = load_config(ROOT / "configs" / "tiny.json")
    with pytest.raises(WrongResultError, match=r"differ by 1\.6 of their norm"):
        inference.measure(config, torch.float32, inference.Work(), tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []
