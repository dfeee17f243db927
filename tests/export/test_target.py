"""A converted model appears whole or not at all; tensors pass into its files block by block, as the library reads them.

Run: pytest tests/export/test_target.py
"""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from slope_dist.errors import UserError
from slope_dist.export import target as target_module
from slope_dist.export.target import new_folder
from slope_dist.export.tensor_files import Planned, write_file_of_tensors, write_shards
from slope_dist.transfer import Transfer


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_folder(target, 10) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert left(target) == ["file"]
    assert left(target.parent) == ["target"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "target", 10) as folder:
        (folder / "file").write_text("x")
        raise error
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    {"folder": target.mkdir, "file": target.touch, "dangling link": lambda: target.symlink_to("nowhere")}[kind]()
    with pytest.raises(UserError, match="is there already"), new_folder(target, 10):
        raise AssertionError("the block must not begin")
    assert left(tmp_path) == ["target"]


def test_what_comes_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(UserError, match="is there already"), new_folder(target, 10):
        target.mkdir()
    assert left(tmp_path) == ["target"]
    assert left(target) == []


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5 * 10**7, 5 * 10**7))
    with new_folder(tmp_path / "fits", 10**7):
        pass
    expected = r"0\.05 GB free, and 0\.10 GB are needed"
    with pytest.raises(UserError, match=expected), new_folder(tmp_path / "target", 10**8):
        raise AssertionError("the block must not begin")
    assert left(tmp_path) == ["fits"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    expected = r"target was not written: .*No space left on device"
    with pytest.raises(UserError, match=expected), new_folder(tmp_path / "target", 10) as folder:
        raise OSError(28, os.strerror(28), str(folder / "model.safetensors"))
    assert left(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, os.strerror(5))])
def test_nothing_is_left_where_the_last_of_all_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def sync(folder: Path) -> None:
        if folder == tmp_path:
            assert left(tmp_path) == ["target"]
            raise error

    monkeypatch.setattr(target_module, "sync_folder", sync)
    with pytest.raises((KeyboardInterrupt, UserError)), new_folder(tmp_path / "target", 10) as folder:
        (folder / "file").write_text("x")
    assert left(tmp_path) == []


def tensors() -> dict[str, Tensor]:
    return {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "narrow": torch.randn(5, 3, dtype=torch.bfloat16),
        "wide": torch.randn(4, 2),
        "shape": torch.tensor([4, 2]),
        "scalar": torch.tensor(3.0),
    }


def planned(found: dict[str, Tensor]) -> list[Planned]:
    def rows(tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(2)) if tensor.dim() else [tensor]

    return [Planned(n, tuple(t.shape), t.dtype, lambda t=t: rows(t)) for n, t in found.items()]  # type: ignore[misc]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    expected = tensors()
    path = tmp_path / "model.safetensors"
    write_file_of_tensors(path, planned(expected), Transfer(), metadata={"base": "x"})
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base": "x"}


def test_shards_are_cut_where_they_are_full_and_indexed(tmp_path: Path) -> None:
    expected = {f"t{index}": torch.randn(10) for index in range(7)}
    hashes = write_shards(tmp_path, "model", planned(expected), Transfer(), shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(hashes) == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    for name, tensor in expected.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert left(tmp_path) == [*files, "model.safetensors.index.json"]


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    assert list(write_shards(tmp_path, "model", planned(tensors()), Transfer())) == ["model.safetensors"]
    assert left(tmp_path) == ["model.safetensors"]


def test_rows_that_do_not_fit_their_plan_are_an_error(tmp_path: Path) -> None:
    for index, rows in enumerate(([torch.zeros(3)], [torch.zeros(4, dtype=torch.float16)], [torch.zeros(2, 2)])):
        plan = Planned("t", (4,), torch.float32, lambda rows=rows: rows)  # type: ignore[misc]
        with pytest.raises(ValueError, match="t: "):
            write_file_of_tensors(tmp_path / str(index), [plan], Transfer())
