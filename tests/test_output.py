"""Claim: what is told is lost where there is no room, and what is shown is on one line that no terminal obeys.

Run: pytest tests/test_output.py
"""

from __future__ import annotations

import pytest

from slope_dist.output import visible
from tests.programs import output_to, run_python


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert visible("a\n\x1b[31mb\u202e\ud800") == r"a\n\x1b[31mb\u202e\ud800"
    assert visible("Größe 7") == "Größe 7"


@pytest.mark.parametrize("text", ["'a'", "'a' * 10**6"])
def test_what_is_told_without_room_is_lost_and_changes_no_exit_code(text: str) -> None:
    program = f"import sys; from slope_dist.output import *; tell({text}); settle_output(); sys.exit(75)"
    with output_to("a full device") as output:
        done = run_python("-c", program, stdout=output)
    assert (done.returncode, done.stderr) == (75, "")
