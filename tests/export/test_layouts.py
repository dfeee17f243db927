"""One state, saved under each of 8 layouts without a step between, converts to byte-identical files in every form.

Run: pytest tests/export/test_layouts.py -m slow
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slope_dist.checkpoint import save
from slope_dist.checkpoint.format import folder_name
from slope_dist.config import load_config
from slope_dist.export.checkpoint_model import CheckpointModel
from slope_dist.export.exporting import FORMS, convert
from slope_dist.export.options import Options
from slope_dist.parallel.environment import discover
from slope_dist.transfer import Transfer
from tests.distributed import run_ranks
from tests.faults.live import CHANGES, LAYOUTS, copy_checkpoint, ranks_of
from tests.runs import small_corpus, train, watch_engines, write_config

CUTS = {"sparse": 4, "adapters": 8}
"""Steps whose state is converted: before the adapters join, and after."""


def save_again(config: str, folder: str, step: int) -> None:
    """Load the newest checkpoint into the layout of this config, and save it from there."""
    from slope_dist.training.trainer import Trainer

    loaded = load_config(config)

    def write(event: str, engine: object, _: object) -> None:
        if event == "loaded":
            fragments, scalars = engine.export_state()  # type: ignore[attr-defined]
            identity = {"tokenizer": trainer.identity["tokenizer"]}
            save(Path(folder), step, fragments, scalars, identity, loaded.model_dump(mode="json"))

    watch_engines(write)
    trainer = Trainer(loaded, discover())
    trainer._start()
    trainer.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "precision"), [("adapters", "bf16"), ("sparse", "fp32")])
def test_every_layout_converts_to_the_same_bytes(tmp_path: Path, phase: str, precision: str) -> None:
    corpus, step = small_corpus(tmp_path), CUTS[phase]
    changes = CHANGES | {"precision": precision}
    run_ranks(train, 1, str(write_config(tmp_path / "first", corpus, **changes)))
    made: dict[str, dict[str, bytes]] = {}
    for number, (layout, placed) in enumerate(LAYOUTS.items()):
        room = tmp_path / str(number)
        copy_checkpoint(tmp_path / "first" / "run", step, room)
        config = write_config(room, corpus, **changes | placed)
        run_ranks(save_again, ranks_of(layout), str(config), str(room / "again"), step)
        stored = CheckpointModel(room / "again" / folder_name(step))
        assert stored.has_adapters == (phase == "adapters")
        assert stored.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        for form in FORMS:
            convert(stored, form, room / form, Options(), Transfer(), Transfer())
            files = files_of(room / form)
            assert any(name.endswith(".safetensors") for name in files)
            expected = made.setdefault(form, files)
            differing = [name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name)]
            assert not differing, f"{layout}, {form}: {differing}"
