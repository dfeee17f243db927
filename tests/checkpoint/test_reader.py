"""Claim: whatever layout wrote a tensor, any range of any rectangle of it is read back exactly; and no checkpoint that
was cut, flipped, mixed up or made by an enemy is loaded: each is refused with one line that names the file, no code of
it runs, and the search falls back to the newest one that verifies.

Run alone: python -m pytest tests/checkpoint/test_reader.py
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slope_dist.checkpoint import Checkpoint, CheckpointError, find_newest, find_newest_on_all_ranks, reader, save
from slope_dist.checkpoint.format import DTYPES, encode
from slope_dist.parallel.fragments import Fragment, MemorySource, StateSource, whole

from .states import assert_holds, fragments_of, in_child, in_ranks, make_state, part_of, save_state
from .test_regions import flat_ranges, layouts, rectangles

WEIGHTS, OPTIMIZER = "rank-00000.weights.safetensors", "rank-00000.optimizer.safetensors"
FILES = [WEIGHTS, OPTIMIZER, "manifest.json"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint that no test changes."""
    return save_state(tmp_path_factory.mktemp("good"), 2).path


@pytest.fixture
def spoilt(good: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(good, tmp_path / good.name)


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused; by the search too."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert text.isprintable() and str(folder) in text
    found = find_newest(folder.parent)
    checkpoint, skipped = found.checkpoint, found.skipped
    assert checkpoint is None or checkpoint.path != folder
    # safetensors names one of several bad tensors at random: what it says after the file may differ.
    assert any(line.split(": ")[:2] == text.split(": ")[:2] for line in skipped)
    return text


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it a right hash again, as an enemy could."""
    content = json.loads((folder / "manifest.json").read_bytes())
    del content["sha256"]
    change(content)
    (folder / "manifest.json").write_bytes(encode(content))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Other bytes in a file, which the manifest vouches for."""
    (folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(folder, lambda content: content["files"].update({name: entry}))


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_layout_reads_what_any_layout_wrote(tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(shapes)
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    tensor = (torch.arange(prod(shape)) % 251).to(dtype).view(shape)
    fragments = [
        Fragment("a", "exp_avg", shape, rectangle, start, stop, part_of(tensor, rectangle, start, stop))
        for rectangle, start, stop in data.draw(layouts(shape))
    ]
    checkpoint = Checkpoint.open(save(tmp_path / "checkpoints", 1, fragments, {}, {}, {}).path)
    assert checkpoint.has("a", "exp_avg") and not checkpoint.has("a", "weight")
    for _ in range(5):
        rectangle = data.draw(rectangles(shape))
        start, stop = data.draw(flat_ranges(rectangle))
        found = checkpoint.read("a", "exp_avg", rectangle, start, stop)
        assert found.dtype == dtype
        assert torch.equal(found, part_of(tensor, rectangle, start, stop))
    shutil.rmtree(tmp_path / "checkpoints")


def test_a_read_tensor_is_the_readers_own(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    checkpoint.read("norm.bias", "weight", whole((5,)), 0, 5).zero_()
    assert_holds(checkpoint, make_state(2))
    assert_holds(Checkpoint.open(good), make_state(2))


def test_a_checkpoint_and_memory_are_the_same_source(good: Path) -> None:
    sources: list[StateSource] = [Checkpoint.open(good), MemorySource.take(fragments_of(make_state(2)), {"step": 2})]
    for source in sources:
        assert source.scalars == {"step": 2}
        assert source.has("norm.bias", "weight") and not source.has("norm.bias", "master")
        found = source.read("norm.bias", "weight", whole((5,)), 1, 4)
        assert torch.equal(found, make_state(2)["norm.bias", "weight"][1:4])
        with pytest.raises(KeyError):
            source.read("norm.bias", "weight", whole((6,)), 0, 6)
        with pytest.raises(KeyError):
            source.read("other.bias", "weight", whole((5,)), 0, 5)


def test_truncation_of_every_file_is_named(good: Path, spoilt: Path) -> None:
    draw = random.Random(1)
    for name in FILES:
        whole_file = (good / name).read_bytes()
        size = len(whole_file)
        header = 8 + struct.unpack("<Q", whole_file[:8])[0] if name != "manifest.json" else size // 3
        for length in {0, 1, 7, 8, header // 2, header, size - 1, *(draw.randrange(size) for _ in range(5))}:
            os.truncate(spoilt / name, length)
            line = refusal(spoilt)
            assert f"{name}: expected" in line
            assert name == "manifest.json" or f"expected {size} bytes, found {length}" in line
            (spoilt / name).write_bytes(whole_file)
    Checkpoint.open(spoilt)


def test_sixty_flipped_bits_are_named(good: Path, spoilt: Path) -> None:
    draw = random.Random(2)
    for trial in range(60):
        name = FILES[trial % 3]
        whole_file = (good / name).read_bytes()
        flip(spoilt / name, draw.randrange(len(whole_file)), draw.randrange(8))
        assert f"{name}: expected" in refusal(spoilt)
        (spoilt / name).write_bytes(whole_file)
    Checkpoint.open(spoilt)


def test_files_missing_extra_and_swapped_are_named(good: Path, spoilt: Path) -> None:
    for name in FILES:
        (spoilt / name).unlink()
        assert f"{name}: expected a file, found none" in refusal(spoilt)
        shutil.copy(good / name, spoilt / name)
    (spoilt / "extra\n.txt").write_text("")
    assert "'extra\\n.txt': expected only the manifest's files" in refusal(spoilt)
    (spoilt / "extra\n.txt").unlink()
    shutil.copy(good / WEIGHTS, spoilt / OPTIMIZER)
    shutil.copy(good / OPTIMIZER, spoilt / WEIGHTS)
    assert f"{OPTIMIZER}: expected" in refusal(spoilt) or f"{WEIGHTS}: expected" in refusal(spoilt)


def test_swapped_keys_of_equal_shape_are_what_the_manifest_says(spoilt: Path) -> None:
    """No check can see two names exchanged by whoever can also rehash; but the change is confined to those names."""
    reseal(spoilt, lambda content: content["tensors"].update({"weight/other": content["tensors"].pop("weight/scale")}))
    checkpoint = Checkpoint.open(spoilt)
    assert not checkpoint.has("scale", "weight") and checkpoint.has("other", "weight")


def test_files_and_manifests_of_another_step_are_refused(spoilt: Path, tmp_path: Path) -> None:
    other = save_state(tmp_path / "other", 9).path
    manifest = (spoilt / "manifest.json").read_bytes()
    shutil.copy(other / "manifest.json", spoilt / "manifest.json")
    assert "manifest.json: expected step 2, found step 9" in refusal(spoilt)
    (spoilt / "manifest.json").write_bytes(manifest)
    shutil.copy(other / WEIGHTS, spoilt / WEIGHTS)
    assert f"{WEIGHTS}: expected sha256" in refusal(spoilt)
    other.rename(tmp_path / "other" / "step-00000010")
    assert "expected step 10, found step 9" in refusal(tmp_path / "other" / "step-00000010")


@pytest.mark.parametrize("name", FILES)
def test_links_are_refused(good: Path, spoilt: Path, name: str) -> None:
    (spoilt / name).unlink()
    (spoilt / name).symlink_to(good / name)
    assert f"{name}: expected a plain file" in refusal(spoilt)
    (spoilt / name).unlink()
    os.mkfifo(spoilt / name)
    assert f"{name}: expected a plain file" in refusal(spoilt)


def test_a_linked_folder_is_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / good.name).symlink_to(good)
    assert "expected a folder, found a file or a link" in refusal(tmp_path / good.name)


def _safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        _safetensors(b"{}", length=2**63),
        _safetensors(b"{}", length=2**64 - 1),
        _safetensors(b"{}", length=99_000_000),
        _safetensors(b"{" * 100_000),
        _safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', b"12345678"),
        _safetensors(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}', b"12345678"),
        _safetensors(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"1234",
        ),
        _safetensors(b"{}"),
    ],
)
def test_hostile_headers_that_the_manifest_vouches_for_are_refused(spoilt: Path, data: bytes) -> None:
    replace_file(spoilt, WEIGHTS, data)
    assert f"{WEIGHTS}: " in refusal(spoilt)


def test_headers_must_say_what_the_manifest_says(good: Path, spoilt: Path) -> None:
    data = (good / WEIGHTS).read_bytes()
    for old, new in [(b'"F16"', b'"I16"'), (b"weight/scale/0", b"weight/scale/1"), (b'"shape":[5]', b'"shape":[1,5]')]:
        header_size = struct.unpack("<Q", data[:8])[0]
        header = data[8 : 8 + header_size].replace(old, new)
        assert header != data[8 : 8 + header_size]
        replace_file(spoilt, WEIGHTS, _safetensors(header, data[8 + header_size :]))
        assert f"{WEIGHTS}: 'weight/" in refusal(spoilt)


def test_no_code_in_a_file_runs(spoilt: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {canary}",)

    attack = pickle.dumps(Attack())
    replace_file(spoilt, WEIGHTS, attack)
    assert WEIGHTS in refusal(spoilt)
    (spoilt / "manifest.json").write_bytes(attack)
    assert "manifest.json" in refusal(spoilt)
    assert not canary.exists()
    pickle.loads(attack)
    assert canary.exists(), "the attack itself works"


def test_unverified_headers_are_checked_when_first_read(spoilt: Path) -> None:
    """What the other ranks do after one has hashed a file: no second hashing, but no header on trust."""
    flip(spoilt / WEIGHTS, (spoilt / WEIGHTS).stat().st_size - 1, 0)
    Checkpoint.open(spoilt, verify=False).read("norm.bias", "weight", whole((5,)), 0, 5)
    replace_file(spoilt, WEIGHTS, _safetensors(b"{}" + b" " * 500))
    checkpoint = Checkpoint.open(spoilt, verify=False)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        checkpoint.read("norm.bias", "weight", whole((5,)), 0, 5)


def test_the_search_names_everything_it_skips(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "absent") == (None, [], [])
    for step in (1, 2, 3, 100_000_000):
        save_state(tmp_path, step)
    flip(tmp_path / "step-100000000" / OPTIMIZER, 500, 3)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    leftover = f"step-00000004.tmp-{'0' * 32}"
    (tmp_path / leftover).mkdir()
    (tmp_path / "mine").mkdir()
    found = find_newest(tmp_path)
    checkpoint, skipped = found.checkpoint, found.skipped
    assert checkpoint is not None and checkpoint.step == 2
    assert [line.split(": ")[0] for line in skipped] == [
        str(tmp_path / name) for name in (leftover, "step-100000000", "step-00000003")
    ]
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.open(tmp_path / "step-00000077")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_newest(tmp_path / "file")


@pytest.mark.parametrize("damaged", range(4))
def test_two_ranks_choose_alike(tmp_path: Path, damaged: int) -> None:
    """Each rank hashes its share of the files; what one finds, both skip, whichever file it is."""
    checkpoints = tmp_path / "checkpoints"

    def save_both() -> None:
        save_state(checkpoints, 1)
        save_state(checkpoints, 2)

    assert in_ranks(save_both, 2, tmp_path) == [0, 0]
    victim = sorted((checkpoints / "step-00000002").glob("rank*"))[damaged]
    flip(victim, victim.stat().st_size - 1, 0)

    def find() -> None:
        found = find_newest_on_all_ranks(checkpoints)
        checkpoint, skipped = found.checkpoint, found.skipped
        assert checkpoint is not None and checkpoint.step == 1
        assert len(skipped) == 1 and f"{victim.name}: expected sha256" in skipped[0]
        assert_holds(checkpoint, make_state(1))
        (tmp_path / "absent").mkdir(exist_ok=True)
        assert find_newest_on_all_ranks(tmp_path / "absent") == (None, [], [])
        with pytest.raises(CheckpointError, match="cannot be read"):
            find_newest_on_all_ranks(victim)

    assert in_ranks(find, 2, tmp_path) == [0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("writers", [1, 2, 3, 8])
def test_ranks_share_the_hashing(writers: int, ranks: int) -> None:
    """Each file is hashed once; nobody has more than its part of the writers, one's files at the least."""
    files = [f"rank-{writer:05d}.{sort}.safetensors" for writer in range(writers) for sort in ("optimizer", "weights")]
    shares = [reader._share(files, here, ranks) for here in range(ranks)]
    assert sorted(name for share in shares for name in share) == files
    for share in shares:
        assert [name.split(".")[1] for name in share] == ["optimizer", "weights"] * (len(share) // 2)
        assert len(share) // 2 <= -(-writers // ranks)


@pytest.mark.parametrize("spoil", [Path.touch, Path.unlink, lambda path: os.truncate(path, 8)])
def test_what_changes_after_it_was_hashed_is_not_read(spoilt: Path, spoil: Callable[[Path], None]) -> None:
    checkpoint = Checkpoint.open(spoilt)
    assert checkpoint.read("norm.bias", "weight", whole((5,)), 0, 5).numel() == 5
    spoil(spoilt / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: .*(found it changed|cannot be read)"):
        checkpoint.read("norm.bias", "weight", whole((5,)), 0, 5)


def test_a_small_range_does_not_read_the_file(tmp_path: Path) -> None:
    """A column of a 64 MiB tensor's last rows: the process that reads it touches a small part of the file."""
    tensor = torch.zeros(4096, 4096)
    fragment = Fragment("a", "weight", (4096, 4096), whole((4096, 4096)), 0, 2**24, tensor)
    folder = save(tmp_path, 1, [fragment], {}, {}, {}).path
    del tensor

    def body() -> None:
        checkpoint = Checkpoint.open(folder, verify=False)
        before = _resident_bytes()
        found = checkpoint.read("a", "weight", ((4000, 4096), (8, 16)), 0, 96 * 8)
        assert not found.any()
        assert _resident_bytes() - before < 16 * 2**20

    assert in_child(body) == 0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
