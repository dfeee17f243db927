"""Checkpoints whose headers or manifests lie, sealed and vouched for as only an enemy would."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slope_dist.checkpoint.format import MANIFEST
from tests.faults.damage import content_of, reseal, safetensors, seal, vouch
from tests.faults.ground import Attack, on_checkpoint
from tests.faults.shared import put
from tests.faults.spoilt import OPTIMIZER, WEIGHTS

DEEP = 100_000
TEBIBYTE = 2**40


def headers() -> list[Attack]:
    """safetensors files whose header lies; the manifest vouches for each."""

    def one(shape: str, start: object, stop: object, dtype: str = "F32", name: str = "a") -> bytes:
        return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{stop}]}}'.encode()

    data = b"12345678"
    files = {
        "claims 2^63 bytes": safetensors(b"{}", length=2**63),
        "claims 2^64 - 1 bytes": safetensors(b"{}", length=2**64 - 1),
        "claims 99 MB": safetensors(b"{}", length=99_000_000),
        "is nested without end": safetensors(b'{"a":' + b"[" * DEEP),
        "has fewer elements than bytes": safetensors(b"{" + one("[1]", 0, 8) + b"}", data),
        "has a product of sides beyond 64 bits": safetensors(b"{" + one("[4611686018427387904,4]", 0, 8) + b"}", data),
        "overlaps": safetensors(b"{" + one("[1]", 0, 4) + b"," + one("[1]", 0, 4, name="b") + b"}", data[:4]),
        "points behind the file": safetensors(b"{" + one("[2]", 4096, 4104) + b"}", data),
        "points before the file": safetensors(b"{" + one("[2]", -8, 0) + b"}", data),
        "ends before it starts": safetensors(b"{" + one("[2]", 8, 0) + b"}", data),
        "leaves a hole": safetensors(b"{" + one("[1]", 0, 4) + b"," + one("[1]", 8, 12, name="b") + b"}", data + data),
        "names a key twice": safetensors(b"{" + one("[1]", 0, 4) + b"," + one("[1]", 4, 8) + b"}", data),
        "knows another dtype": safetensors(b"{" + one("[1]", 0, 8, "OBJECT") + b"}", data),
        "is empty": safetensors(b"{}"),
        "is empty before data": safetensors(b"{}", data),
        "is no JSON": safetensors(b"import os", data),
        "holds 20,000 tensors": safetensors(
            b"{" + b",".join(one("[0]", 0, 0, name=str(n)) for n in range(20_000)) + b"}"
        ),
    }
    array = io.BytesIO()
    np.save(array, np.array([None, {}], dtype=object), allow_pickle=True)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(64 * 2**20))
    files |= {"is an array of objects": array.getvalue(), "is a zip of 64 MiB in 64 KiB": bomb.getvalue()}

    def place(file: bytes) -> Callable[[Path, Path], object]:
        return lambda folder, _: vouch(folder, WEIGHTS, file)

    return [on_checkpoint(f"a header that {what}", place(file), [WEIGHTS]) for what, file in files.items()]


def manifests() -> list[Attack]:
    """Manifests with a right seal; what they say is wrong."""

    def body(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
        """Change the text before the seal."""
        return lambda folder, _: put(folder / MANIFEST, seal(change((folder / MANIFEST).read_bytes()[:-78])))

    def scalars(value: bytes) -> Callable[[Path, Path], object]:
        return body(lambda text: text.replace(b'"scalars":{', b'"scalars":{"a":' + value + b",", 1))

    def renamed(name: str, outside: bool = False) -> Callable[[Path, Path], object]:
        def do(folder: Path, _: Path) -> None:
            content = content_of(folder)
            content["files"][name] = content["files"].pop(WEIGHTS)
            for tensor in content["tensors"].values():
                for part in tensor["fragments"]:
                    part["file"] = name if part["file"] == WEIGHTS else part["file"]
            reseal(folder, lambda own: own.update(content))
            if outside:
                (folder / WEIGHTS).rename(folder.parent.parent / "weights")
            else:
                (folder / WEIGHTS).unlink()

        return do

    def first_tensor(**changes: object) -> Callable[[Path, Path], object]:
        def change(content: dict) -> None:
            next(iter(content["tensors"].values())).update(changes)

        return lambda folder, _: reseal(folder, change)

    def one_piece(shape: list[int]) -> Callable[[Path, Path], object]:
        """Let a tensor be one piece of an absurd shape."""

        def change(content: dict) -> None:
            tensor = next(iter(content["tensors"].values()))
            size = int(np.prod(np.array(shape, dtype=object)))
            part = tensor["fragments"][0] | {"rectangle": [[0, side] for side in shape], "start": 0, "stop": size}
            tensor.update(shape=shape, fragments=[part])

        return lambda folder, _: reseal(folder, change)

    def sparse(folder: Path, _: Path) -> None:
        put(folder / MANIFEST, b"")
        os.truncate(folder / MANIFEST, TEBIBYTE)

    changes: dict[str, Callable[[Path, Path], object]] = {
        "nested without end": scalars(b"[" * DEEP + b"]" * DEEP),
        "nested without end or closing": lambda folder, _: put(folder / MANIFEST, seal(b'{"a":' * DEEP)),
        "with a number of 5,000 digits": scalars(b"9" * 5000),
        "with a key twice": scalars(b'1,"a":2'),
        "with NaN": scalars(b"NaN"),
        "not in UTF-8": scalars(b'"\xff"'),
        "that is a list": lambda folder, _: put(folder / MANIFEST, seal(b"[1")),
        "of format 2": lambda folder, _: reseal(folder, lambda content: content.update(format=2)),
        "of format true": lambda folder, _: reseal(folder, lambda content: content.update(format=True)),
        "of a file ../weights": renamed("../weights", outside=True),
        "of a file ../../weights": renamed("../../weights", outside=True),
        "of a file /etc/passwd": renamed("/etc/passwd"),
        "of a file with NUL": renamed("rank-00000.weights.safetensors\0"),
        "of a file with a line feed": renamed("rank-00000.weights.safetensors\n"),
        "of a file in Arabic digits": renamed("rank-" + 5 * "\u0660" + ".weights.safetensors"),
        "of a tensor without pieces": first_tensor(fragments=[]),
        "of a tensor of 2^80 elements": one_piece([2**40, 2**40]),
        "of a tensor in 10,000 dimensions": one_piece([1] * 10_000),
        "of 1 TiB of nothing": sparse,
    }
    # Where the seal and the text are right, what is wrong may show in the file that is named.
    names = [MANIFEST, OPTIMIZER, WEIGHTS]
    return [on_checkpoint(f"a manifest {what}", change, names) for what, change in changes.items()]
