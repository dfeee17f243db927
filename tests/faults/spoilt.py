"""Accidents: files cut short, bits flipped, files and folders mixed up."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

from slope_dist.checkpoint import find_newest
from slope_dist.checkpoint.format import LATEST, MANIFEST, folder_name
from tests.faults.damage import SEAL_SIZE, content_of, flip, header_size, reseal
from tests.faults.refusal import wrongly_judged
from tests.faults.shared import NEWEST, PREVIOUS, PREVIOUS_STEP, STEP, GoodRun, put

WEIGHTS, OTHER_WEIGHTS = (f"rank-0000{rank}.weights.safetensors" for rank in (0, 1))
OPTIMIZER, OTHER_OPTIMIZER = (f"rank-0000{rank}.optimizer.safetensors" for rank in (0, 1))
RANK_FILES = (WEIGHTS, OTHER_WEIGHTS, OPTIMIZER, OTHER_OPTIMIZER)


def begin_of_data(name: str, data: bytes) -> int:
    """Where a file's header ends; of a manifest, where its seal begins."""
    return len(data) - SEAL_SIZE if name == MANIFEST else header_size(data)


class Truncation:
    """Cut a file of the newest checkpoint."""

    def __init__(self, shared: Path) -> None:
        self.good = GoodRun(shared)
        self.cuts = []
        for name, data in self.good.files.items():
            begin = begin_of_data(name, data)
            self.cuts += [(name, length) for length in (0, 1, 7, 8, begin // 2, begin - 1, begin, len(data) - 1)]

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        if index < len(self.cuts):
            name, length = self.cuts[index]
        else:
            name = list(self.good.files)[index % len(self.good.files)]
            length = draw.randrange(len(self.good.files[name]))
        checkpoints = self.good.copy_into(room)
        data = self.good.files[name]
        put(checkpoints / NEWEST / name, data[:length])
        said = ["expected", "found"] if name == MANIFEST else [f"expected {len(data)} bytes, found {length}"]
        problem = wrongly_judged(checkpoints, NEWEST, [name], PREVIOUS_STEP, said)
        return problem and f"{name} cut to {length} of {len(data)} bytes: {problem}"


class BitFlips:
    """Flip one bit: in turn of the header and of the data of each file, of the manifest, of its seal, of `latest`."""

    def __init__(self, shared: Path) -> None:
        self.good = GoodRun(shared)
        self.regions: list[tuple[str, int, int]] = [(LATEST, 0, len(NEWEST) + 1)]
        for name, data in self.good.files.items():
            begin = begin_of_data(name, data)
            self.regions += [(name, 0, begin), (name, begin, len(data))]

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        name, start, stop = self.regions[index % len(self.regions)]
        position, bit = draw.randrange(start, stop), draw.randrange(8)
        checkpoints = self.good.copy_into(room)
        if name == LATEST:
            put(checkpoints / LATEST, flip((checkpoints / LATEST).read_bytes(), position, bit))
            problem = without_influence(checkpoints)
        else:
            put(checkpoints / NEWEST / name, flip(self.good.files[name], position, bit))
            problem = wrongly_judged(checkpoints, NEWEST, [name], PREVIOUS_STEP, ["expected", "found"])
        return problem and f"bit {bit} of byte {position} of {name}: {problem}"


def without_influence(checkpoints: Path) -> str | None:
    """What is wrong if the newest checkpoint is not found as if nothing had happened."""
    search = find_newest(checkpoints)
    if search.checkpoint is None or search.checkpoint.path != checkpoints / NEWEST or search.damaged:
        return f"the search found {search.checkpoint and search.checkpoint.path} and said {search.damaged}"
    return None


class MixUp(NamedTuple):
    """Files or folders where they do not belong: done by `do`(checkpoints); then `spoilt` is refused by a name."""

    what: str
    do: Callable[[Path], object]
    names: tuple[str, ...]
    spoilt: str = NEWEST
    found_step: int | None = PREVIOUS_STEP


class Swapped:
    """One mix-up after the other."""

    def __init__(self, shared: Path) -> None:
        self.good = GoodRun(shared)

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        case = MIX_UPS[index % len(MIX_UPS)]
        checkpoints = self.good.copy_into(room)
        case.do(checkpoints)
        problem = wrongly_judged(checkpoints, case.spoilt, case.names, case.found_step)
        return problem and f"{case.what}: {problem}"


def _exchange(first: str, second: str) -> Callable[[Path], object]:
    def do(checkpoints: Path) -> None:
        folder = checkpoints / NEWEST
        (folder / first).rename(folder / "aside")
        (folder / second).rename(folder / first)
        (folder / "aside").rename(folder / second)

    return do


def _copy(source: str, target: str) -> Callable[[Path], object]:
    """Copy a file over another; both are paths below the folder of checkpoints."""
    return lambda checkpoints: put(checkpoints / target, (checkpoints / source).read_bytes())


def _remove(name: str) -> Callable[[Path], object]:
    return lambda checkpoints: (checkpoints / NEWEST / name).unlink()


def _of_files() -> list[MixUp]:
    """Mix-ups within one checkpoint."""
    cases = [MixUp(f"{name} is missing", _remove(name), (name,)) for name in (*RANK_FILES, MANIFEST)]
    for name in ("notes.txt", ".hidden", "rank-00002.weights.safetensors", "manifest.json.part", "manifest\njson"):
        cases.append(MixUp(f"{name!r} is there too", _copy(f"{NEWEST}/{WEIGHTS}", f"{NEWEST}/{name}"), (repr(name),)))
    cases.append(MixUp("a folder is there too", lambda at: (at / NEWEST / "rank").mkdir(), ("'rank'",)))
    for first, second in ((WEIGHTS, OTHER_WEIGHTS), (OPTIMIZER, OTHER_OPTIMIZER), (WEIGHTS, OPTIMIZER)):
        cases.append(MixUp(f"{first} and {second} are exchanged", _exchange(first, second), (first, second)))
    for first, second in product(RANK_FILES[:2], RANK_FILES[:2]):
        if first != second:
            cases.append(MixUp(f"{first} twice", _copy(f"{NEWEST}/{first}", f"{NEWEST}/{second}"), (second,)))
    for first, second in product(RANK_FILES[2:], RANK_FILES[2:]):
        if first != second:
            cases.append(MixUp(f"{first} twice", _copy(f"{NEWEST}/{first}", f"{NEWEST}/{second}"), (second,)))

    def exchange_ranks(checkpoints: Path) -> None:
        _exchange(WEIGHTS, OTHER_WEIGHTS)(checkpoints)
        _exchange(OPTIMIZER, OTHER_OPTIMIZER)(checkpoints)

    cases.append(MixUp("both ranks' files are exchanged", exchange_ranks, RANK_FILES))
    cases.append(
        MixUp(
            "the manifest has another name",
            lambda at: (at / NEWEST / MANIFEST).rename(at / NEWEST / "Manifest.json"),
            (MANIFEST,),
        )
    )
    return cases


def _of_steps() -> list[MixUp]:
    """Mix-ups of two checkpoints."""
    cases = [
        MixUp(f"{name} is of another step", _copy(f"{PREVIOUS}/{name}", f"{NEWEST}/{name}"), (name,))
        for name in (*RANK_FILES, MANIFEST)
    ]

    def all_files(checkpoints: Path) -> None:
        for name in RANK_FILES:
            _copy(f"{PREVIOUS}/{name}", f"{NEWEST}/{name}")(checkpoints)

    def stale_manifest(checkpoints: Path) -> None:
        # It says the right step, and is sealed; only the files are not those it knows.
        content = content_of(checkpoints / PREVIOUS)
        reseal(checkpoints / NEWEST, lambda own: own.update({**content, "step": STEP}))

    def exchange_folders(checkpoints: Path) -> None:
        (checkpoints / NEWEST).rename(checkpoints / "aside")
        (checkpoints / PREVIOUS).rename(checkpoints / NEWEST)
        (checkpoints / "aside").rename(checkpoints / PREVIOUS)

    def rename(source: str, target: str) -> Callable[[Path], object]:
        return lambda checkpoints: (checkpoints / source).rename(checkpoints / target)

    def copy(source: str, target: str) -> Callable[[Path], object]:
        return lambda checkpoints: shutil.copytree(checkpoints / source, checkpoints / target)

    later, between, big = folder_name(7), folder_name(5), folder_name(10**12)
    return [
        *cases,
        MixUp("all files are of another step", all_files, RANK_FILES),
        MixUp("the manifest is of another save of this step", stale_manifest, RANK_FILES),
        MixUp("the folders are exchanged", exchange_folders, (MANIFEST,), NEWEST, None),
        MixUp("the folder is renamed to a later step", rename(NEWEST, later), (MANIFEST,), later),
        MixUp("the folder is renamed to an earlier step", rename(NEWEST, between), (MANIFEST,), between),
        MixUp("the older folder is renamed to a later step", rename(PREVIOUS, big), (MANIFEST,), big, STEP),
        MixUp("the older folder stands twice", copy(PREVIOUS, later), (MANIFEST,), later, STEP),
    ]


MIX_UPS = [*_of_files(), *_of_steps()]
