"""A loss that a checkpoint carries: what its state makes of a fixed batch.

Hashes show that the bytes came back; this, that they mean the same to the program that reads them: another version, a
kernel, a layout that puts a tensor in the wrong place would change the loss and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slope_dist.config import Config
from slope_dist.data.corpus import Corpus
from slope_dist.errors import UserError
from slope_dist.sparse import kernels
from slope_dist.training.evaluation import Evaluator, evaluate

SAMPLES = 2
"""Windows of the validation split in the fixed batch."""

TOLERANCE = {"fp32": 1e-5, "bf16": 2.0**-7, "fp16": 2.0**-9}
"""By which a loss may change, relative to it, with the layout or the machine: sums are made in another order."""


def measure(
    engine: Evaluator, corpus: Corpus, config: Config, data_ranks: int, data_rank: int, by: str | None = None
) -> dict[str, Any]:
    """The fingerprint of an engine's state. Collective; the same on every rank.

    Args:
        engine: what holds the state.
        corpus: the validation split.
        config: the run.
        data_ranks: ranks that share the windows.
        data_rank: this one.
        by: what computes it, where that is no engine of a run, and so in no layout.
    """
    found = evaluate(engine, corpus, config, data_ranks, data_rank, samples=SAMPLES)
    assert found is not None
    parallel = config.parallel.model_dump(mode="json")
    same = {key: parallel[key] for key in ("engine", "tensor", "pipeline", "zero_stage", "sequence_parallel")}
    same |= {"compile": True} if config.training.compile else {}
    same |= {"kernels": "measured"} if kernels.active() is not None else {}
    layout = same | {"data": data_ranks} if by is None else {"engine": by}
    return {
        "loss": found.loss,
        "samples": SAMPLES,
        "tolerance": TOLERANCE[config.precision],
        "made_by": {
            **layout,
            "precision": config.precision,
            "micro_batch_size": config.training.micro_batch_size,
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def compare(stored: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Refuse a state that gives another loss than the one it was saved with.

    Args:
        stored: as it was measured at the save.
        found: as it was measured after the load.
        where: the checkpoint, for the message.

    Raises:
        UserError: if they differ at all in the same layout on the same kind of machine, or by more than the wider of
            the two tolerances elsewhere.
    """
    made_by = found["made_by"]
    # The compiler, and whoever measures which kernel is fastest, may choose others at each start, and so another order
    # of sums.
    same = stored["made_by"] == made_by and "compile" not in made_by and "kernels" not in made_by
    bound = 0.0 if same else max(stored["tolerance"], found["tolerance"])
    if not abs(found["loss"] - stored["loss"]) <= bound * abs(stored["loss"]):
        allowed = "exactly that, in the same layout" if same else f"that to within {bound:.1e} of it"
        raise UserError(
            f"{where}: its state gives a loss of {found['loss']!r} on the fixed batch, and gave {stored['loss']!r} "
            f"when it was saved (it should be {allowed}): this program does not compute what the one that wrote it "
            "did; use that version, or start from another checkpoint"
        )
