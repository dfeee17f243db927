"""A rank's side of the watch: it says where it is, at the cost of a store to memory.

    begin_step(step)        at each turn of the training loop
    with doing("a save"):   what it does until it leaves the block; as a decorator, while the function runs
    beat()                  inside what takes long: another batch, another piece of a file

Where nobody watches, and in a process forked off a rank, these do nothing. The first time a rank does a thing it may
take as long as the start of a run, for something may be compiled or connected on the way.

A thread of its own shows that Python runs, four times a second: it stands still where the rank is stopped, or a call
keeps the interpreter's lock. It also answers the question for the last collectives (see parallel/flight.py).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

from slope_dist.watching.record import Record

SIGNAL = signal.SIGRTMIN + 11 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
"""Lets a rank write its stacks, in C and without the interpreter's lock. Of the signals that nobody has a use for."""

PULSE_SECONDS = 0.25

_heart: Heart | None = None


def begin_step(step: int) -> None:
    """Step `step` (from 1) begins; the one before it is done."""
    if _heart is not None:
        _heart.begin_step(step)


def beat() -> None:
    """What is being done gets on."""
    if _heart is not None:
        _heart.beat()


class doing(ContextDecorator):
    """What this rank does in a block or a function.

    Args:
        what: in words: "a save".
        long: it may always take as long as a run's start, and threads beside the main one count as getting on.
        afresh: what comes after it is done for the first time again.
    """

    def __init__(self, what: str, *, long: bool = False, afresh: bool = False) -> None:
        self.what = what
        self.long = long
        self.afresh = afresh

    def __enter__(self) -> None:
        if _heart is not None:
            _heart.enter(self)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if _heart is not None:
            _heart.leave(self, well=kind is None)


class Heart:
    """One in a process, made by its main thread; the functions above are its.

    Args:
        collectives: number of collectives begun in the default group.
        trace: the last collectives, as JSON values.
        alarm: called four times a second with the rank's own threads alive; for what else is to be looked after.
    """

    def __init__(self, collectives: Callable[[], int], trace: Callable[[], Any], alarm: Callable[[], None]) -> None:
        global _heart
        self._collectives = collectives
        self._trace = trace
        self._alarm = alarm
        self.record_file, self.record = Record.create()
        self.stacks_file = os.memfd_create("slope-stacks")
        self.trace_file = os.memfd_create("slope-trace")
        self._main = threading.get_ident()
        self._marks = self._beside = self._place = 0
        self._step = 0
        self._steps_begun = 0
        self._stack: list[doing] = []
        self._known: set[str] = set()
        self._show()
        # `chain` would let the rank die of the signal.
        faulthandler.register(SIGNAL, file=self.stacks_file, all_threads=True, chain=False)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._live, name="pulse", daemon=True)
        self._thread.start()
        _heart = self

    @property
    def address(self) -> dict[str, Any]:
        """Where this rank's signs are found by a process of the same user on the same machine."""
        files = {"record": self.record_file, "stacks": self.stacks_file, "trace": self.trace_file}
        return {"pid": os.getpid(), "main": self._main, **files}

    def begin_step(self, step: int) -> None:
        """See the function."""
        self._steps_begun += 1
        self._step = step
        self._place = 0
        self._show()

    def beat(self) -> None:
        """See the function."""
        if threading.get_ident() == self._main:
            self._marks += 1
            self.record.mark(self._marks, self._step, self._place, self._is_long())
        else:
            # Two threads that miss each other's count still change it; one may outlive the heart of a run that failed.
            self._beside += 1
            with contextlib.suppress(ValueError):
                self.record.mark_beside(self._beside)

    def enter(self, what: doing) -> None:
        """Begin something; only what the main thread does counts."""
        if threading.get_ident() == self._main:
            self._stack.append(what)
            self._place += 1
            self._show()

    def leave(self, what: doing, *, well: bool) -> None:
        """End it."""
        if threading.get_ident() == self._main and self._stack:
            self._stack.pop()
            if well:
                self._known.add(what.what)
            if what.afresh:
                self._known.clear()
                # The step that it is in.
                self._steps_begun = min(self._steps_begun, 1)
            self._place += 1
            self._show()

    def own_folder(self) -> None:
        """From now on reports may be written into the run folder."""
        self.record.own()

    def close(self) -> None:
        """Nobody watches any more."""
        global _heart
        _heart = None
        self.record.leave()
        self._closing.set()
        self._thread.join()
        faulthandler.unregister(SIGNAL)
        self.record.close()
        for file in (self.record_file, self.stacks_file, self.trace_file):
            os.close(file)

    def _is_long(self) -> bool:
        # A step is whole when the next one has begun.
        return self._steps_begun <= 1 or any(what.long or what.what not in self._known for what in self._stack)

    def _show(self) -> None:
        self._marks += 1
        words = [what.what for what in self._stack] or ["the step itself" if self._steps_begun else "the start"]
        self.record.say(", in ".join(reversed(words)))
        self.record.mark(self._marks, self._step, self._place, self._is_long())

    def _live(self) -> None:
        pulses = 0
        while not self._closing.wait(PULSE_SECONDS):
            pulses += 1
            self.record.pulse(pulses, self._collectives())
            asked = self.record.asked
            if asked != self.record.answered:
                # Nothing here may end the thread, lest a healthy rank look like one that has lost its interpreter.
                text = "null"
                with contextlib.suppress(Exception):
                    text = json.dumps(self._trace())
                os.ftruncate(self.trace_file, 0)
                os.pwrite(self.trace_file, text.encode(), 0)
                self.record.answered = asked
            self._alarm()


def _forget() -> None:
    global _heart
    _heart = None


os.register_at_fork(after_in_child=_forget)
