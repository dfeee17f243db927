"""`tools/benchmark.py data` prepares one text by prepare and by datasets.map, sees that both make the same number of
tokens, and says what each took.

Run: pytest tests/benchmark/test_data_benchmark.py -m "slow or not slow"
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slope_dist.benchmark import preparing
from slope_dist.benchmark.timing import WrongResultError
from tests.benchmark.test_benchmark_tool import benchmark


@pytest.mark.slow
def test_both_kinds_of_tokenizer_on_two_processes(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    done = benchmark("data", "--megabytes", "6", "--workers", "2", "--rounds", "2", "--output", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert {"device", "datasets", "tokenizers", "sentencepiece", "commit"} <= report["machine"].keys()
    assert [row["tokenizer"] for row in report["rows"]] == list(preparing.KINDS)
    for row in report["rows"]:
        assert row["tokenizer"] in done.stdout and row["bytes"] >= 6e6 and row["workers"] == 2
        assert len(row["ratios"]) == 2 and row["ratio"] > 0
        for rival in row["rivals"].values():
            assert len(rival["seconds"]) == 2 and rival["mb_per_second"] > 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_VOCAB_SIZE", 400)


@pytest.mark.parametrize("kind", preparing.KINDS)
@pytest.mark.usefixtures("small")
def test_a_small_text_gives_a_row(kind: str) -> None:
    (row,) = preparing.measure(0.2, 1, 1, [kind])
    assert set(row["rivals"]) == {preparing.OURS, preparing.THEIRS}
    assert row["tokens"] > 2e4 and len(row["ratios"]) == 1


@pytest.mark.usefixtures("small")
def test_a_rival_that_makes_other_tokens_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_map", lambda *arguments: 5)
    with pytest.raises(WrongResultError, match=r"'datasets': 5"):
        preparing.measure(0.2, 1, 1, [preparing.KINDS[0]])
