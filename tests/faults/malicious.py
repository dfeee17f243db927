"""Enemies: files that would run code, name places elsewhere, lie about sizes, or never end."""

from __future__ import annotations

import os
import pickle
import random
import socket
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path

from slope_dist.checkpoint.format import LATEST, MANIFEST
from slope_dist.data.prepare import megatron_indexed_dataset
from tests.faults.damage import seal, vouch
from tests.faults.ground import FILE, OLD_TORCH, PYTHON, SHELL, TORCH, Attack, Ground, on_checkpoint
from tests.faults.hostile_headers import DEEP, TEBIBYTE, headers, manifests
from tests.faults.shared import NEWEST, GoodRun, put
from tests.faults.spoilt import OPTIMIZER, WEIGHTS, without_influence


class Malicious:
    """One attack after the other."""

    def __init__(self, shared: Path) -> None:
        self.good = GoodRun(shared)
        # Seconds, and no part of any trial.
        megatron_indexed_dataset()

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        attack = ATTACKS[index % len(ATTACKS)]
        ground = Ground(self.good, room, index)
        problem = attack.meet(ground)
        if problem is None:
            # An attack that could not have worked would show nothing.
            pickle.loads(ground.pickled((SHELL, PYTHON, FILE)[index % 3]))
            problem = None if ground.canary.exists() else "the pickles of this trial are harmless"
        return problem and f"{attack.what}: {problem}"


def _pickles() -> list[Attack]:
    """A pickle wherever a file is read, sealed or not."""

    def state(name: str, how: str, vouched: bool) -> Attack:
        def meet(at: Ground) -> str | None:
            data = at.pickled(how)
            return at.checkpoint(
                lambda folder, _: vouch(folder, name, data) if vouched else put(folder / name, data), [name]
            )

        return Attack(f"pickle ({how}) as {name}{', vouched for' * vouched}", meet)

    def manifest(make: Callable[[Ground], bytes]) -> Callable[[Ground], str | None]:
        return lambda at: at.checkpoint(lambda folder, _: put(folder / MANIFEST, make(at)), [MANIFEST])

    def corpus(name: str, how: str, same_size: bool, manifest: bool = True) -> Attack:
        def spoil(at: Ground, path: Path) -> None:
            data = at.pickled(how)
            put(path, data.ljust(path.stat().st_size, b".")[: path.stat().st_size] if same_size else data)

        where = f"pickle ({how}) as {name} of the corpus{', same size' * same_size}{', no manifest' * (not manifest)}"
        return Attack(where, lambda at: at.corpus(lambda folder: spoil(at, folder / name), name, manifest))

    return [
        *(state(*case) for case in product((WEIGHTS, OPTIMIZER), (SHELL, TORCH, OLD_TORCH), (True, False))),
        Attack("pickle as manifest", manifest(lambda at: at.pickled(SHELL))),
        Attack("pickle as manifest, sealed", manifest(lambda at: seal(at.pickled(PYTHON)))),
        Attack("torch.save as manifest", manifest(lambda at: at.pickled(TORCH))),
        Attack("pickle as latest", lambda at: _latest(at, lambda path: put(path, at.pickled(SHELL)))),
        Attack("pickle beside the files", lambda at: _extra(at, "state.pt")),
        Attack("pickle as config", lambda at: at.config(lambda path: path.write_bytes(at.pickled(SHELL)))),
        Attack("torch.save as config", lambda at: at.config(lambda path: path.write_bytes(at.pickled(TORCH)))),
        Attack(
            "pickle as metrics", lambda at: at.metrics(lambda path: path.write_bytes(at.pickled(SHELL) + b"\n" * 9))
        ),
        corpus("tokenizer.model", SHELL, False),
        corpus("tokenizer.model", TORCH, False, manifest=False),
        corpus("train.bin", SHELL, True),
        corpus("train.bin", TORCH, False),
        corpus("train.bin", SHELL, True, manifest=False),
        corpus("train.idx", SHELL, True),
        corpus("train.idx", SHELL, False, manifest=False),
        corpus("manifest.json", PYTHON, False),
    ]


def _extra(at: Ground, name: str) -> str | None:
    return at.checkpoint(lambda folder, _: put(folder / name, at.pickled(SHELL)), [name])


def _latest(at: Ground, spoil: Callable[[Path], object]) -> str | None:
    """`latest` is a hint that nothing relies on: the newest checkpoint is found whatever it is."""
    checkpoints = at.good.copy_into(at.room)
    spoil(checkpoints / LATEST)
    return at.watch(lambda: without_influence(checkpoints))


def _links() -> list[Attack]:
    """Links, pipes and folders in place of files."""

    def link(name: str) -> Callable[[Path, Path], object]:
        def do(folder: Path, checkpoints: Path) -> None:
            (folder / name).rename(checkpoints.parent / name)
            (folder / name).symlink_to(checkpoints.parent / name)

        return do

    def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path, Path], object]:
        def do(folder: Path, _: Path) -> None:
            (folder / name).unlink()
            make(folder / name)

        return do

    def linked_folder(folder: Path, checkpoints: Path) -> None:
        folder.rename(checkpoints.parent / "elsewhere")
        folder.symlink_to(checkpoints.parent / "elsewhere")

    attacks = []
    for name in (WEIGHTS, OPTIMIZER, MANIFEST):
        makers: dict[str, Callable[[Path, Path], object]] = {
            "a link to the right file": link(name),
            "a pipe": replace(name, os.mkfifo),
            "a folder": replace(name, Path.mkdir),
            "a link to nothing": replace(name, lambda path: path.symlink_to("nowhere")),
            "a link to /dev/zero": replace(name, lambda path: path.symlink_to("/dev/zero")),
        }
        attacks += [on_checkpoint(f"{what} as {name}", make, [name]) for what, make in makers.items()]
    return [
        *attacks,
        Attack("a socket as manifest", lambda at: at.checkpoint(replace(MANIFEST, _socket), [MANIFEST])),
        Attack("a link as folder", lambda at: at.checkpoint(linked_folder, [NEWEST])),
        Attack("a pipe as latest", lambda at: _latest(at, _pipe)),
        Attack("a link to the parent as latest", lambda at: _latest(at, lambda path: _linked(path, ".."))),
        Attack("another name in latest", lambda at: _latest(at, lambda path: put(path, b"../../../etc\n"))),
        Attack(
            "a pipe as the corpus's tokenizer", lambda at: at.corpus(lambda to: _pipe(to / "tokenizer.model"), "token")
        ),
        Attack("a pipe as the corpus's manifest", lambda at: at.corpus(lambda to: _pipe(to / MANIFEST), MANIFEST)),
        Attack("a pipe as train.bin", lambda at: at.corpus(lambda to: _pipe(to / "train.bin"), "train.bin")),
        Attack("a pipe as metrics", lambda at: at.metrics(os.mkfifo)),
    ]


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _linked(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _socket(path: Path) -> None:
    # A socket's path may have about a hundred characters; relative ones are short.
    before = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


def _others() -> list[Attack]:
    """Hostile indices, tokenizers, configs and metrics."""

    def index(name: str, value: int) -> Attack:
        def spoil(folder: Path) -> None:
            path = folder / "train.idx"
            data = bytearray(path.read_bytes())
            fields = {"version": ("<Q", 9), "code": ("<B", 17), "sequences": ("<Q", 18), "boundaries": ("<Q", 26)}
            fields |= {"length": ("<i", 34), "pointer": ("<q", 34 + 4 * struct.unpack_from("<Q", data, 18)[0])}
            struct.pack_into(fields[name][0], data, fields[name][1], value)
            path.write_bytes(data)

        return Attack(f"a corpus index with {name} {value}", lambda at: at.corpus(spoil, "train.idx", manifest=False))

    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, TEBIBYTE)

    deep = b"[" * DEEP
    rows = b'{"step": 1}\n' + deep + b'\n{"step": 2}\n'
    return [
        *(index("code", 7), index("version", 2), index("sequences", 2**60), index("boundaries", 2**63)),
        *(index("length", -5), index("pointer", -(2**62))),
        Attack("a config nested without end", lambda at: at.config(lambda path: path.write_bytes(b'{"run":' + deep))),
        Attack("a config of 1 TiB of nothing", lambda at: at.config(sparse)),
        Attack(
            "a corpus manifest nested without end",
            lambda at: at.corpus(lambda to: put(to / MANIFEST, b'{"format":1,"splits":' + deep), MANIFEST),
        ),
        Attack(
            "a tokenizer of 1 TiB of nothing", lambda at: at.corpus(lambda to: sparse(to / "tokenizer.model"), "token")
        ),
        Attack(
            "a corpus manifest of 1 TiB of nothing", lambda at: at.corpus(lambda to: sparse(to / MANIFEST), MANIFEST)
        ),
        Attack("metrics nested without end", lambda at: at.metrics(lambda path: path.write_bytes(rows))),
        Attack("metrics of 1 TiB of nothing", lambda at: at.metrics(sparse)),
    ]


ATTACKS = [*_pickles(), *headers(), *manifests(), *_links(), *_others()]
