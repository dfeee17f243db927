"""Claim: a rank's page shows its step, what it does and how often it got on, also from other threads; what it does for
the first time has the long limit; in forked children and without a heart nothing is written.

Run: pytest tests/watching/test_heartbeat.py
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from slope_dist.watching import heartbeat
from slope_dist.watching.heartbeat import PULSE_SECONDS, Heart, beat, begin_step, doing


@pytest.fixture
def heart() -> Iterator[Heart]:
    made = Heart(lambda: 41, lambda: ["a trace"], lambda: None)
    yield made
    made.close()


def test_the_page_shows_the_step_and_what_is_done_in_it(heart: Heart) -> None:
    assert heart.record.read().doing == "the start"
    begin_step(3)
    places = [heart.record.read().place]
    with doing("an evaluation"):
        places.append(heart.record.read().place)
        with doing("reading its batch"):
            sign = heart.record.read()
            assert (sign.step, sign.doing) == (3, "reading its batch, in an evaluation")
    places.append(heart.record.read().place)
    assert places == sorted(set(places)), "places of a step tell apart what was done in it"
    assert heart.record.read().doing == "the step itself"
    before = heart.record.read().marks
    beat()
    assert heart.record.read().marks == before + 1


def test_what_is_done_for_the_first_time_may_take_long(heart: Heart) -> None:
    def is_long() -> bool:
        return heart.record.read().long

    assert is_long()
    begin_step(1)
    assert is_long(), "the first step is not done yet"
    begin_step(2)
    assert not is_long()
    for expected in (True, False):
        with doing("an evaluation"):
            assert is_long() == expected
    for _ in range(2):
        with doing("a save", long=True):
            assert is_long()
    with doing("the switch", long=True, afresh=True):
        assert is_long()
    assert is_long(), "the first step of a new engine"
    begin_step(3)
    with doing("an evaluation"):
        # Compiled once more.
        assert is_long()
    begin_step(4)
    assert not is_long()


def test_what_failed_was_not_done(heart: Heart) -> None:
    begin_step(1)
    begin_step(2)
    with pytest.raises(ValueError, match="no"), doing("an evaluation"):
        raise ValueError("no")
    with doing("an evaluation"):
        assert heart.record.read().long


def test_other_threads_are_counted_apart(heart: Heart) -> None:
    before = heart.record.read()
    thread = threading.Thread(target=beat)
    thread.start()
    thread.join()
    after = heart.record.read()
    assert (after.marks, after.beside) == (before.marks, before.beside + 1)


def test_python_pulses_and_answers(heart: Heart) -> None:
    before = heart.record.read().pulses
    heart.record.asked += 1
    end = time.monotonic() + 20 * PULSE_SECONDS
    while heart.record.read().pulses < before + 2 and time.monotonic() < end:
        time.sleep(0.01)
    sign = heart.record.read()
    assert sign.pulses >= before + 2 and sign.collectives == 41
    assert heart.record.answered == heart.record.asked
    assert os.pread(heart.trace_file, 100, 0) == b'["a trace"]'


def test_a_forked_child_writes_nothing(heart: Heart) -> None:
    begin_step(1)
    before = heart.record.read().marks
    child = os.fork()
    if child == 0:
        begin_step(9)
        beat()
        os._exit(0)
    os.waitpid(child, 0)
    assert heart.record.read().marks == before


def test_nothing_is_done_where_nobody_watches() -> None:
    assert heartbeat._heart is None
    begin_step(1)
    beat()
    with doing("nothing"):
        pass


def test_closing_gives_all_back() -> None:
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    Heart(lambda: 0, list, lambda: None).close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)
    assert heartbeat._heart is None
