"""A GPU is timed by its own events, warm, and with an empty cache where asked. Seen on a stand-in: no GPU has run this.

Run: pytest tests/benchmark/test_gpu_timing.py
"""

from __future__ import annotations

import pytest
import torch

from slope_dist.benchmark import machine, timing

CUDA = torch.device("cuda")


class Card:
    """Notes what is asked of torch.cuda; its clock goes on by `milliseconds` with every call of a rival."""

    def __init__(self, milliseconds: float) -> None:
        self.notes: list[str] = []
        self.clock = 0.0
        self.milliseconds = milliseconds

    def run(self) -> None:
        self.notes.append("run")
        self.clock += self.milliseconds

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, card: Card) -> None:
        self.card = card

    def record(self) -> None:
        self.card.notes.append("record")
        self.at = self.card.clock

    def elapsed_time(self, stop: Event) -> float:
        assert self.card.notes[-1] == "wait", "events are read once the work is done"
        return stop.at - self.at


class Scratch:
    def __init__(self, card: Card) -> None:
        self.card = card

    def zero_(self) -> None:
        self.card.notes.append("flush")
        self.card.clock += 50.0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card(milliseconds=0.25)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.notes.append("wait"))
    monkeypatch.setattr(timing.torch, "empty", lambda *shape, **keywords: Scratch(made))
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.01)
    return made


def test_a_sample_is_of_as_many_calls_as_fill_a_millisecond(card: Card) -> None:
    taken = timing.in_turns({"one": card.run}, CUDA, seconds=0)["one"]
    assert taken.seconds == pytest.approx([0.25e-3] * timing.MIN_ROUNDS)
    assert card.notes[-9:] == ["wait", "flush", "record", "run", "run", "run", "run", "record", "wait"]


def test_the_cache_is_emptied_before_every_call_where_asked_and_its_time_is_no_rival_s(card: Card) -> None:
    taken = timing.in_turns({"one": card.run}, CUDA, seconds=0, flush=True)["one"]
    assert taken.seconds == pytest.approx([0.25e-3] * timing.MIN_ROUNDS)
    assert card.notes[-18:] == ["wait", *["flush", "record", "run", "record"] * 4, "wait"]


def test_work_goes_on_for_the_warm_up_before_the_first_round(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = timing.MIN_ROUNDS * 4

    def calls(warm: float) -> int:
        monkeypatch.setattr(timing, "WARM_SECONDS", warm)
        card.notes.clear()
        timing.in_turns({"one": card.run}, CUDA, seconds=0)
        return card.notes.count("run") - rounds

    assert calls(0.0) == 2, "once for what the first call does alone, once to see how long one takes"
    assert calls(0.05) > 20


def test_what_nvidia_smi_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        stdout = "580.1, 700.00 W, 1980 MHz, 1980 MHz, 3201 MHz\n"

    asked = []
    monkeypatch.setattr(machine.subprocess, "run", lambda command, **keywords: asked.append(command) or Told)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"uuid": "12-34"}))
    assert machine.card(CUDA) == {
        "driver": "580.1",
        "power_limit_watts": "700.00",
        "clock_mhz": "1980",
        "most_clock_mhz": "1980",
        "memory_clock_mhz": "3201",
    }
    assert "--id=GPU-12-34" in asked[0]
    Told.stdout = "1410 MHz, 692.31 W, 61, 0x0000000000000004\n"
    assert machine.state_of_card(CUDA) == {
        "clock_mhz": "1410",
        "power_watts": "692.31",
        "celsius": "61",
        "clocks_event_reasons": "0x0000000000000004",
    }
    assert machine.state_of_card(torch.device("cpu")) == {}


@pytest.mark.parametrize("answer", [FileNotFoundError(), "No devices were found\n"], ids=["absent", "useless"])
def test_no_nvidia_smi_is_no_error(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **keywords: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return type("Told", (), {"stdout": answer})

    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    assert machine.card(CUDA) == {}
