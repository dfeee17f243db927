"""A block's linears send at most 0.52 of the gradients and 0.58 of the gathered weights of dense ones; all are counted.

Run: pytest tests/benchmark/test_traffic.py -m slow
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slope_dist.benchmark import traffic
from tests.benchmark.test_benchmark_tool import benchmark
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow

GRADIENTS = 0.52
"""Promised; half by arithmetic, plus what the flat buffers of engines round up."""

GATHERED_WEIGHTS = 0.58
"""Promised for ZeRO 3 and FSDP2; (8 bits of values + 1 of metadata) / 16 by arithmetic."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The tool's own report on a small model, as a user gets it."""
    file = tmp_path_factory.mktemp("traffic") / "traffic.json"
    engines = ("zero0", "zero2", "zero3", "fsdp")
    done = benchmark(
        *("traffic", "--engines", *engines, "--gradient-dtypes", "fp32"),
        *("--hidden", "64", "--ffn", "128", "--output", str(file)),
    )
    assert done.returncode == 0, done.stderr
    for text in (*engines, "width 64", "2 ranks", str(file)):
        assert text in done.stdout.replace("\n", "")
    return json.loads(file.read_text())


def test_linears_send_half_of_the_gradients(report: dict) -> None:
    assert [row["engine"] for row in report["rows"]] == ["zero0", "zero2", "zero3", "fsdp"]
    for row in report["rows"]:
        assert row["reduced"]["bytes_an_element"] == 4, "every fp32 gradient travels once"
        assert 0.5 <= row["reduced"]["linears"] <= GRADIENTS, row
        assert row["reduced"]["linears"] < row["reduced"]["block"] <= GRADIENTS, row


def test_linears_gather_nine_sixteenths_of_the_weights(report: dict) -> None:
    rows = {row["engine"]: row for row in report["rows"]}
    assert rows["zero0"]["gathered"] is None, "weights are whole on every rank, and each steps on all of them"
    # After the step, the updated values; masks never change.
    assert 0.5 <= rows["zero2"]["gathered"]["linears"] <= GRADIENTS
    for engine in ("zero3", "fsdp"):
        gathered = rows[engine]["gathered"]
        assert gathered["bytes_an_element"] == 2 * 2, "bf16, once in forward and once in backward"
        assert 0.5625 <= gathered["linears"] <= gathered["block"] <= GATHERED_WEIGHTS, gathered


def test_the_block_is_the_block(report: dict) -> None:
    for row in report["rows"]:
        linears = 4 * 64 * 64 + 2 * 64 * 128
        # Six biases and two norms of two vectors.
        rest = 5 * 64 + 128 + 4 * 64
        assert row["dense"]["elements"] == {"linears": linears, "rest": rest, "metadata": 0}
        assert row["2:4"]["elements"] == {"linears": linears // 2, "rest": rest, "metadata": linears // 8}
        assert row["dense"]["block_bytes"]["reduced"] == 4 * (linears + rest)


def test_the_report_says_what_was_measured(report: dict) -> None:
    assert {"torch", "deepspeed", "commit", "python"} <= report["machine"].keys()
    assert [row["precision"] for row in report["rows"]] == ["fp32", "bf16", "bf16", "bf16"]
    for row in report["rows"]:
        assert all(
            row[pattern]["step_bytes"]["reduced"] > row[pattern]["block_bytes"]["reduced"]
            for pattern in ("dense", "2:4")
        )


def count() -> list[dict[str, int]]:
    """What the counter makes of each collective of 8 fp32 numbers, and of those that are not the group's."""
    group = dist.group.WORLD
    assert group is not None
    same_ranks, alone = dist.new_group([0, 1]), [dist.new_group([rank]) for rank in (0, 1)][dist.get_rank()]
    found = []

    def counted(function, *arguments, **keywords) -> None:
        with traffic.TrafficCounter(group) as counter:
            function(*arguments, **keywords)
        found.append(dict(counter.total))

    def halves() -> list[torch.Tensor]:
        return [torch.ones(4), torch.ones(4)]

    counted(dist.all_reduce, torch.ones(8))
    counted(dist.all_reduce, torch.ones(8), group=same_ranks)
    counted(dist.reduce, torch.ones(8), 0)
    counted(dist.reduce_scatter_tensor, torch.ones(4), torch.ones(8))
    counted(dist.reduce_scatter, torch.ones(4), halves())
    counted(dist.all_gather_into_tensor, torch.ones(8), torch.ones(4))
    counted(dist.all_gather, halves(), torch.ones(4))
    counted(dist.broadcast, torch.ones(8), 0)
    counted(dist.all_reduce, torch.ones(8), group=alone)
    counted(dist.barrier)
    counted(torch.add, torch.ones(8), 1)
    with pytest.raises(NotImplementedError, match="alltoall"):
        counted(dist.all_to_all_single, torch.ones(8), torch.ones(8))
    return found


def test_every_collective_of_the_group_is_counted_once() -> None:
    reduced, gathered = {"reduced": 32}, {"gathered": 32}
    expected = [reduced] * 5 + [gathered] * 3 + [{}] * 3
    assert run_ranks(count, 2) == [expected, expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "100"], "--hidden 100 is not a positive multiple of 8"),
        (["--ffn", "0"], "--ffn 0 is not a positive multiple of 8"),
        (["--engines", "zero4"], "invalid choice: 'zero4'"),
        (["--gradient-dtypes", "fp16"], "invalid choice: 'fp16'"),
        (["--output", "no/such/folder/x.json"], "there is no folder no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    import benchmark as tool

    assert tool.main(["traffic", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1


def test_a_rank_that_fails_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank \d ended with code 1:.*input_value=9"):
        traffic.measure([traffic.Case("zero9", "fp32")], traffic.Size(hidden_size=64, ffn_size=128))
