"""Models in our own form for its tests: written, and changed with their hashes made right again, as an enemy could."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from slope_dist.checkpoint.format import encode
from slope_dist.export import open_model
from slope_dist.export.options import Options
from slope_dist.export.slope import SlopeExport, SlopeModel
from slope_dist.export.stored import StoredModel
from slope_dist.export.tensor_files import Planned, write_file_of_tensors
from slope_dist.sparse import CompressedMatrix, Pattern
from slope_dist.transfer import Transfer
from tests.export.models import MemoryModel

TENSORS, DESCRIPTION = "weights.safetensors", "slope.json"
TWO_FOUR = Pattern(2, 4)
LAYER = "decoder.layers.1.fc1"


def written(stored: StoredModel, folder: Path, **options: Any) -> tuple[SlopeModel, list[str]]:
    """A model written to `folder` and opened there, and what the writer had to say."""
    folder.mkdir()
    export = SlopeExport(stored, Options(**{"tokenizer": False} | options))
    said = export.write(folder, Transfer())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert 0.9 * export.bytes < sum(sizes.values()) - sizes[DESCRIPTION] <= 1.01 * export.bytes
    opened = open_model(folder)
    assert isinstance(opened, SlopeModel)
    return opened, said


def with_sparse_factors(stored: MemoryModel, *, holes: bool = False) -> MemoryModel:
    """The model with its first factors pruned 2:4; with `holes`, one group of each row keeps one entry, one none."""
    for name, form in stored.linears.items():
        if form.adapter_rank:
            down = stored._tensors[f"{name}.adapter.down"]
            down.copy_(CompressedMatrix.prune(down, TWO_FOUR).expand())
            if holes:
                down[:, :8] = 0.0
                down[:, 3] = 1.5
    return stored


def reseal(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors in a folder, with the right sizes and hashes, as an enemy could."""
    (folder / TENSORS).unlink()
    sha256 = write_file_of_tensors(
        folder / TENSORS, [Planned.of(name, tensor) for name, tensor in tensors.items()], Transfer()
    )
    entry = {"bytes": (folder / TENSORS).stat().st_size, "sha256": sha256}
    redescribe(folder, lambda content: content["files"].update({TENSORS: entry}))


def redescribe(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another description, sealed."""
    content = json.loads((folder / DESCRIPTION).read_bytes())
    del content["sha256"]
    change(content)
    (folder / DESCRIPTION).write_bytes(encode(content))
