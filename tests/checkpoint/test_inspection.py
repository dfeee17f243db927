"""Claim: logical hashes are those of the bytes put together by hand, whatever layout wrote them; what is measured of a
layer is what its dense matrix says; nothing reads more of a tensor at once than one chunk; files that change meanwhile
and manifests that no run writes are refused.

Run alone: python -m pytest tests/checkpoint/test_inspection.py
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_dist.checkpoint import Checkpoint, CheckpointError, streaming
from slope_dist.checkpoint.comparison import compare
from slope_dist.checkpoint.inspection import (
    count_totals,
    hash_lines,
    hash_of_all,
    logical_hashes,
    measure_layers,
    open_folder,
)
from slope_dist.checkpoint.validation import check_state
from slope_dist.errors import UserError
from slope_dist.export.opening import form_of
from slope_dist.sparse import Pattern, codec
from tests.runs import small_corpus

from .rewriting import RUNS, STEP, folder_of, opened, raw_bytes, raw_tensors, rewrite
from .states import in_child, in_ranks, save_state
from .test_reader import reseal

FC1 = "decoder.layers.0.fc1"
VALUES = f"weight/{FC1}.weight.values"


def by_hand(folder: Path) -> dict[str, str]:
    return {
        key: hashlib.sha256(f"{dtype} {shape}\n".replace(", ", ",").encode() + data).hexdigest()
        for key, (dtype, shape, data) in raw_bytes(folder).items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_logical_hashes_are_those_of_the_bytes(base: Path, name: str) -> None:
    folder = folder_of(base, name)
    hashes = logical_hashes(opened(folder))
    assert hashes == by_hand(folder) and list(hashes) == sorted(hashes)
    assert hash_of_all(hashes) == hashlib.sha256(hash_lines(hashes).encode()).hexdigest()


@pytest.mark.parametrize("name", ["data", "tensor", "bf16"])
def test_logical_hashes_know_no_layout(base: Path, tmp_path: Path, name: str) -> None:
    folder = folder_of(base, name)
    other = rewrite(folder, tmp_path)
    there, here = Checkpoint.open(folder).manifest, Checkpoint.open(other).manifest
    assert there.tensors != here.tensors
    assert logical_hashes(opened(other)) == logical_hashes(opened(folder))


def test_one_and_three_ranks_write_the_same_hashes(tmp_path: Path) -> None:
    assert in_child(lambda: save_state(tmp_path / "one", 1)) == 0
    assert in_ranks(lambda: save_state(tmp_path / "three", 1), 3, tmp_path) == [0] * 3
    one, three = (Checkpoint.open(tmp_path / name / "step-00000001") for name in ("one", "three"))
    assert len(one.manifest.files) < len(three.manifest.files)
    # Among the tensors is one without dimensions, and F64 and F16 ones.
    assert logical_hashes(one) == logical_hashes(three) == by_hand(three.path)


def test_a_bit_a_dtype_and_a_shape_change_one_hash(base: Path, tmp_path: Path) -> None:
    folder = folder_of(base, "data")
    before = logical_hashes(opened(folder))
    key = f"exp_avg/{FC1}.bias"

    def negative_zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][5] = -tensors[key][5]

    changes = {
        "bit": negative_zero,
        "dtype": lambda tensors: tensors.update({key: tensors[key].view(torch.float16)[: len(tensors[key])]}),
        "shape": lambda tensors: tensors.update({key: tensors[key].view(2, -1)}),
    }
    for name, change in changes.items():
        after = logical_hashes(opened(rewrite(folder, tmp_path / name, lambda tensors, _, do=change: do(tensors))))
        assert [other for other in before if before[other] != after[other]] == [key]
        assert hash_of_all(before) != hash_of_all(after)


@pytest.mark.parametrize("name", RUNS)
def test_layers_are_measured_as_their_dense_matrix_says(base: Path, name: str) -> None:
    folder = folder_of(base, name)
    checkpoint, tensors = opened(folder), raw_tensors(folder)
    rows = {row.layer.name: row for row in measure_layers(checkpoint)}
    text = checkpoint.config["sparsity"]["pattern"]
    patterns = {row.layer.pattern for row in rows.values()}
    assert patterns == ({None} if text == "dense" else {None, Pattern.parse(text)})
    for name, row in rows.items():
        assert row.layer.problem is None and row.layer.weight is not None
        stored = tensors[row.layer.weight]
        dense, kept = stored, torch.ones(stored.shape, dtype=torch.bool)
        if row.layer.pattern is not None:
            indices = tensors[f"metadata/{name}.weight.indices"]
            dense = codec.expand(stored, indices, row.layer.pattern)
            kept = codec.mask_of(indices, row.layer.pattern)
        assert (row.layer.shape, row.entries) == (dense.shape, dense.numel())
        assert row.kept == int(kept.sum()) and row.zeros == int((stored == 0).sum())
        assert math.isclose(row.norm, float(dense.double().norm()), rel_tol=1e-12)
        mask = tensors.get(f"metadata/{name}.weight.column_mask")
        assert row.column_kept == (None if mask is None else int(codec.unpack_bits(mask).sum()))
        down = tensors.get(f"weight/{name}.adapter.down")
        assert row.layer.adapter_rank == (None if down is None else len(down))
    assert any(row.column_kept for row in rows.values()) == (checkpoint.config["sparsity"]["column_mask_interval"] > 1)


def test_zeros_are_counted_of_both_signs(base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], _: Any) -> None:
        tensors[VALUES].view(-1)[:3] = torch.tensor([0.0, -0.0, 0.0])

    rows = measure_layers(opened(rewrite(folder_of(base, "data"), tmp_path, change)))
    assert {row.layer.name: row.zeros for row in rows if row.zeros} == {FC1: 3}


def test_totals_add_up(base: Path) -> None:
    folder = folder_of(base, "bf16")
    totals, tensors = count_totals(opened(folder)), raw_tensors(folder)
    pruned = [key.removeprefix("metadata/").removesuffix("indices") for key in tensors if key.startswith("metadata/")]
    kept = sum(tensors[f"weight/{name}values"].numel() for name in pruned)
    assert totals.pruned_kept == kept > 0 and totals.pruned_entries == 2 * kept
    assert totals.trained == sum(t.numel() for key, t in tensors.items() if key.startswith("weight/"))
    assert totals.adapters == sum(t.numel() for key, t in tensors.items() if key[:6] == "weight" and ".adapter." in key)
    # 2 bytes an entry kept and 1 bit an entry, of a dense 2 bytes an entry: 9/16.
    assert totals.pruned_bytes * 16 == totals.dense_bf16_bytes * 9 == totals.dense_bytes * 9
    assert totals.pruned_optimizer_bytes * 2 == totals.dense_optimizer_bytes == 3 * 4 * 2 * kept
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert totals.ranks == 2 and sum(size for _, size in totals.files.values()) == sum(sizes.values())
    assert totals.files["weights"] == (2, sum(size for name, size in sizes.items() if ".weights." in name))


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_no_read_is_larger_than_a_chunk_and_none_depends_on_it(
    base: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    folder = folder_of(base, "mask")
    whole = logical_hashes(opened(folder)), measure_layers(opened(folder))
    sizes: list[int] = []
    read = Checkpoint.read

    def watched(self: Checkpoint, *arguments: Any) -> torch.Tensor:
        result = read(self, *arguments)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(Checkpoint, "read", watched)
    monkeypatch.setattr(streaming, "CHUNK_ELEMENTS", chunk)
    checkpoint = opened(folder)
    hashes, rows = logical_hashes(checkpoint), measure_layers(checkpoint)
    check_state(checkpoint)
    assert compare(checkpoint, opened(folder)).equal
    assert hashes == whole[0]
    for row, other in zip(rows, whole[1], strict=True):
        assert (row.kept, row.zeros, row.column_kept) == (other.kept, other.zeros, other.column_kept)
        assert math.isclose(row.norm, other.norm, rel_tol=1e-12)
    assert max(sizes) <= chunk and len(sizes) > 1000


def test_a_tensor_beyond_the_chunk_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, *arguments: sizes.append(arguments[4] - arguments[3]) or read(self, *arguments)
    )
    assert in_child(lambda: save_state(tmp_path, STEP)) == 0
    tensor = torch.arange(5 * 2**19).bfloat16().view(5, -1)
    folder = rewrite(
        tmp_path / f"step-{STEP:08d}", tmp_path / "large", lambda tensors, _: tensors.update({"weight/large": tensor})
    )
    assert logical_hashes(opened(folder)) == by_hand(folder)
    assert max(sizes) <= streaming.CHUNK_ELEMENTS and sum(sizes) > 5 * 2**19


def test_a_file_that_changes_after_opening_is_noticed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(base, "data")
    read = Checkpoint.read

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def write(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        # The clock of a file system may not have ticked since the save.
        os.utime(path, ns=(1, 1))

    cases = [(cut, 5), (write, 5), (Path.unlink, 5), (write, len(raw_bytes(source)) - 1)]
    for number, (spoil_file, at) in enumerate(cases):
        checkpoint = opened(rewrite(source, tmp_path / str(number)))
        # Tensors are read in the order of their names: moments first, weights last.
        file = f"rank-00000.{'optimizer' if at == 5 else 'weights'}.safetensors"
        reads = 0

        def watched(self: Checkpoint, *arguments: Any) -> torch.Tensor:
            nonlocal reads
            result = read(self, *arguments)
            reads += 1
            if reads == at:  # noqa: B023
                spoil_file(self.path / file)  # noqa: B023
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "read", watched)
            with pytest.raises(CheckpointError, match=f"{file}: .*(changed|cannot be read)"):
                logical_hashes(checkpoint)
        assert reads == at

    checkpoint = opened(rewrite(source, tmp_path / "before"))
    cut(checkpoint.path / file)
    with pytest.raises(CheckpointError, match=f"{file}: expected it to stay .* found it changed"):
        logical_hashes(checkpoint)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


def reshape(size: int, dims: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        entry = content["tensors"]["exp_avg/decoder.final_layer_norm.bias"]
        rectangle = [[0, 1]] * (dims - 1) + [[0, size]]
        [piece] = entry["fragments"]
        entry["shape"] = [1] * (dims - 1) + [size]
        entry["fragments"] = [piece | {"rectangle": rectangle, "stop": size}]

    return change


@pytest.mark.parametrize(
    "text, change",
    [
        ("expected at most 64 levels", lambda content: content["config"].update(nested(80))),
        ("expected a shape of moderate size", reshape(32, 40)),
        ("expected a shape of moderate size", reshape(10**400, 1)),
        ("expected at least its tensors' [0-9]+ bytes", reshape(10**15, 1)),
    ],
)
def test_manifests_that_no_run_writes_are_refused(
    base: Path, tmp_path: Path, text: str, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = shutil.copytree(folder_of(base, "dense"), tmp_path / f"step-{STEP:08d}")
    reseal(folder, change)
    with pytest.raises(CheckpointError, match=text):
        open_folder(folder)


def test_what_cannot_be_opened_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    for name in ("absent", "file", "empty", "circle", "nul\0"):
        with pytest.raises(UserError) as caught:
            open_folder(tmp_path / name)
        assert not isinstance(caught.value, CheckpointError)


def test_a_prepared_corpus_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    for open_it in (open_folder, form_of):
        with pytest.raises(UserError, match=f"{corpus} is a prepared corpus and no model"):
            open_it(corpus)
