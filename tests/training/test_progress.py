"""The progress line where there is no terminal, and numbers for people.

Run: pytest tests/training/test_progress.py
"""

from __future__ import annotations

import re
import time

import pytest
import torch

from slope_dist.training.progress import PeakMemory, ProgressLine, peak_memory
from slope_dist.training.utilization import Utilization
from slope_dist.transfer import duration_text, size_text
from tests.distributed import run_ranks


def line(**changes: object) -> ProgressLine:
    values = {
        "first_step": 1,
        "steps": 4,
        "tokens_per_step": 100,
        "utilization": Utilization(flops_per_token=1e6, ranks=1, peak=None, basis=""),
        "log_interval": 2,
        "show": True,
    }
    return ProgressLine(**(values | changes))  # type: ignore[arg-type]


def test_plain_lines_say_everything(capsys: pytest.CaptureFixture[str]) -> None:
    progress = line()
    progress.start()
    for step in range(1, 5):
        assert progress.step(step, 3.25, "sparse" if step < 4 else "adapters", None) > 0
    progress.say("evaluated")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    # The first step, every second one, and the last.
    assert [text.split(" | ")[0] for text in lines] == ["step 1/4", "step 2/4", "step 4/4", "evaluated"]
    parts = (
        r"step 2/4 \| 50\.0 % \| loss 3\.2500 \| [\d,]+ tokens/s \| .*peak memory [\d.]+ [KMG]?i?B \| sparse \| .+ left"
    )
    assert re.fullmatch(parts, lines[1])
    assert "\x1b" not in "".join(lines)


def test_a_line_s_speed_is_of_all_steps_since_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = line(steps=5, log_interval=4, tokens_per_step=100)
    progress.start()
    # A pause, as for an evaluation, is no step's.
    for step, (pause, seconds) in enumerate([(0, 50.0), (0, 1.0), (9.0, 2.0), (0, 1.0), (0, 10.0)], start=1):
        clock[0] += pause
        progress.pause()
        clock[0] += seconds
        assert progress.step(step, 1.0, "sparse", None) == pytest.approx(100 / seconds)
    said = re.findall(r"step (\d).* ([\d,]+) tokens/s", capsys.readouterr().out)
    assert said == [("1", "2"), ("4", "75"), ("5", "10")]


def test_mfu_is_shown_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    progress = line(utilization=Utilization(flops_per_token=1e6, ranks=1, peak=1e12, basis=""), log_interval=1)
    progress.start()
    progress.step(1, 1.0, "sparse", None)
    assert re.search(r"tokens/s \| MFU [\d.]+ % \(dense-equivalent\) \| ", capsys.readouterr().out)


def test_skipped_steps_are_always_shown(capsys: pytest.CaptureFixture[str]) -> None:
    progress = line()
    progress.start()
    progress.step(1, float("nan"), "sparse", "non-finite")
    assert "SKIPPED (non-finite)" in capsys.readouterr().out


def test_other_ranks_keep_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = line(show=False)
    progress.start()
    progress.step(2, 1.0, "sparse", "non-finite")
    progress.say("something")
    progress.close()
    assert capsys.readouterr().out == ""


def test_numbers_for_people() -> None:
    sizes = [0, 1023, 1024, 1536, 2**20, 5 * 2**30, 3000 * 2**30]
    assert [size_text(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "5.00 GiB",
        "3000.00 GiB",
    ]
    seconds = [0.04, 9.9, 10.4, 59.6, 192, 3600, 7325]
    assert [duration_text(value) for value in seconds] == ["0.0s", "9.9s", "10s", "1m00s", "3m12s", "1h00m", "2h02m"]


def peaks_around_a_block(size: int) -> list[int | None]:
    with PeakMemory() as peak:
        block = torch.ones(size, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
        del block
    return [peak.bytes, peak_memory()]


def test_peak_memory_sees_what_was_freed_again() -> None:
    """In a process of its own: what other tests have left here may be freed meanwhile, and hide the block."""
    size = 64 * 2**20
    [[inside, whole]] = run_ranks(peaks_around_a_block, 1, size)
    if inside is None:
        pytest.skip("this system does not tell the peak of a stretch of time")
    assert 0.9 * size < inside < 3 * size
    assert whole >= size
