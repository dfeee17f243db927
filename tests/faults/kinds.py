"""All kinds of trials, in the order in which they are run: the quick ones first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.distributed import Outcome, end_ranks
from tests.faults import hostile_state
from tests.faults.deaths import Deaths
from tests.faults.disk import BadDisk
from tests.faults.fuzzed_configs import FuzzedConfigs, ValidConfigs
from tests.faults.fuzzed_files import FuzzedFiles
from tests.faults.hangs import Hangs
from tests.faults.hostile_state import HostileState
from tests.faults.kills import POINTS, KilledAtPoint, KilledAtRandom
from tests.faults.launched import end_launched
from tests.faults.live import WholeRuns
from tests.faults.malicious import ATTACKS, Malicious
from tests.faults.replay import PowerCut
from tests.faults.resharding import PAIRS, Resharding
from tests.faults.resuming import CutAnywhere, KilledAtSwitch
from tests.faults.runner import Kind, Trial
from tests.faults.signals import AskedToStop
from tests.faults.spoilt import MIX_UPS, BitFlips, Swapped, Truncation

LIVE_LIMIT = 180.0
"""Seconds of a trial that runs the whole program, up to four ranks and twice."""


LAUNCHED = 20
"""Trials of each live kind end to end."""

_LIVE: list[tuple[str, str, int, Callable[[WholeRuns], Trial]]] = [
    ("cuts", "A run killed after any step goes on to the same bits in its layout", 100, CutAnywhere),
    (
        "switch",
        "A run killed around the adapter switch goes on in another layout as if nothing had been",
        60,
        KilledAtSwitch,
    ),
    (
        "kill one",
        "After kill -9 of a rank at a random moment nothing is lost that was reported as saved",
        200,
        partial(KilledAtRandom, all_ranks=False),
    ),
    (
        "kill all",
        "After kill -9 of all ranks at a random moment nothing is lost that was reported as saved",
        200,
        partial(KilledAtRandom, all_ranks=True),
    ),
    (
        "bad disks",
        "A disk that fails for a while costs a line for each attempt, and neither the run nor a checkpoint",
        50,
        BadDisk,
    ),
    (
        "requests to stop",
        "Signals and stop files at any moment: the step done is saved, all ranks leave, the run goes on later",
        100,
        AskedToStop,
    ),
    (
        "hangs",
        "A rank that stands still is found within the timeout + 5 s and named, the job ends, and the run goes on",
        50,
        Hangs,
    ),
    (
        "deaths",
        "A rank that dies in a step ends the others in 15 s, named in the first line, and the run goes on",
        50,
        Deaths,
    ),
    (
        "kill at points",
        "After kill -9 of one rank or all at a named point of a save nothing is lost that was reported as saved",
        200 * len(POINTS),
        KilledAtPoint,
    ),
]
"""Kinds of trials of whole runs."""


def all_kinds() -> list[Kind]:
    """Every kind, its claim, and how often it is tried."""
    return [
        Kind(
            "truncation",
            "A checkpoint with a file cut short is refused by file and size, and the one before it is found",
            300,
            Truncation,
        ),
        Kind(
            "bit flips",
            "One flipped bit in any file of a checkpoint is refused by the file's name; in `latest` it changes nothing",
            2000,
            BitFlips,
        ),
        Kind(
            "swapped",
            "Files or folders that are missing, too many, exchanged, doubled or of another step are refused by name",
            len(MIX_UPS),
            Swapped,
        ),
        Kind(
            "malicious files",
            "No file runs code, reaches elsewhere, hangs or exhausts memory: each is refused in one line",
            len(ATTACKS),
            Malicious,
        ),
        Kind(
            "malicious state",
            "A checkpoint with right hashes and a wrong content ends the run that would load it in one line, code 2",
            len(hostile_state.LIES),
            HostileState,
            hostile_state.LIMIT,
        ),
        Kind(
            "fuzzed files",
            "A manifest or header changed at random is refused, or read as the format's description says",
            20_000,
            FuzzedFiles,
        ),
        Kind(
            "valid configs",
            "A run that the schema allows is accepted, and written and read the same",
            200,
            ValidConfigs,
        ),
        Kind(
            "fuzzed configs",
            "A config that cannot be is refused in one line with its key; what is accepted is read back the same",
            5000,
            FuzzedConfigs,
        ),
        Kind(
            "power cuts",
            "Whatever a disk holds after any step of a save loads as the old checkpoint or the new one",
            500,
            PowerCut,
        ),
        Kind(
            "resharding",
            "Saved in one of 8 layouts, loaded in another: every logical tensor is the same, and fp32 losses to 1e-5",
            2 * len(PAIRS),
            Resharding,
            LIVE_LIMIT,
        ),
        *(Kind(name, claim, trials, start(trial), LIVE_LIMIT) for name, claim, trials, trial in _LIVE),
        *(
            Kind(f"deepspeed: {name}", f"{claim}, started by `deepspeed`", LAUNCHED, start(trial, end_launched), 300.0)
            for name, claim, _, trial in _LIVE
        ),
    ]


def start(trial: Callable[[WholeRuns], Trial], ranks: Callable[..., list[Outcome]] = end_ranks) -> Callable[..., Trial]:
    """What a kind starts with: a trial on runs whose ranks are forked, or launched."""
    return lambda shared: trial(WholeRuns(shared, ranks))
