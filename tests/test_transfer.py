"""Claim: a transfer is silent while it is short, and then says how far it has come, how fast, and what is left.

Run: pytest tests/test_transfer.py
"""

from __future__ import annotations

from slope_dist.transfer import QUIET_SECONDS, Transfer, count_text

MIB = 2**20


def test_a_line_after_each_quiet_time() -> None:
    now, said = 100.0, []
    transfer = Transfer("saving step 12", said.append, clock=lambda: now)
    transfer.begin(10 * MIB)
    for _ in range(9):
        now += 1.0
        transfer.add(MIB)
    assert said == [
        "saving step 12: 3.0 MiB of 10.0 MiB, 1.0 MiB/s, 7.0s left",
        "saving step 12: 6.0 MiB of 10.0 MiB, 1.0 MiB/s, 4.0s left",
        "saving step 12: 9.0 MiB of 10.0 MiB, 1.0 MiB/s, 1.0s left",
    ]


def test_a_short_one_says_nothing_and_a_new_one_begins_anew() -> None:
    now, said = 0.0, []
    transfer = Transfer("loading", said.append, clock=lambda: now)
    for _ in range(5):
        transfer.begin(4)
        now += QUIET_SECONDS - 0.5
        transfer.add(4)
    assert said == []
    now += 1.0
    transfer.add(4)
    assert len(said) == 1 and said[0].startswith("loading: 8 B of 4 B") and said[0].endswith("0.0s left")


def test_units_other_than_bytes() -> None:
    now, said = 0.0, []
    transfer = Transfer("tokens predicted", said.append, text=count_text, clock=lambda: now)
    transfer.begin(65_536)
    now += 4.0
    transfer.add(12_288)
    assert said == ["tokens predicted: 12,288 of 65,536, 3,072/s, 17s left"]


def test_without_a_voice_it_only_counts() -> None:
    Transfer().add(1)
