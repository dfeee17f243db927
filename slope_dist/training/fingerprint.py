"""A loss that a checkpoint carries: what its state makes of a fixed batch.

Hashes show that the bytes came back; this, that they mean the same to the program that reads them: another version, a
kernel, a layout that puts a tensor in the wrong place would change the loss and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch

from slope_dist.config import Config
from slope_dist.data.corpus import Corpus
from slope_dist.errors import UserError
from slope_dist.parallel.gpus import driver_version
from slope_dist.sparse import kernels
from slope_dist.training.evaluation import Evaluator, evaluate

SAMPLES = 2
"""Windows of the validation split in the fixed batch."""

TOLERANCE = {"fp32": 1e-5, "bf16": 2.0**-7, "fp16": 2.0**-9}
"""By which a loss may change, relative to it, with the layout or the machine: sums are made in another order."""


def measure(
    engine: Evaluator, corpus: Corpus, config: Config, data_ranks: int, data_rank: int, by: str | None = None
) -> dict[str, Any]:
    """The fingerprint of an engine's state, its loss None if it is not finite. Collective; the same on every rank.

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
        "loss": found.loss if isfinite(found.loss) else None,
        "samples": SAMPLES,
        "tolerance": TOLERANCE[config.precision],
        "made_by": {
            **layout,
            "precision": config.precision,
            "micro_batch_size": config.training.micro_batch_size,
            "torch": str(torch.__version__),
            **_machine(),
            "threads": torch.get_num_threads(),
        },
    }


def _machine() -> dict[str, Any]:
    """What decides in which order sums are made, beside the layout and the program."""
    cpu = {"cpu": torch.backends.cpu.get_cpu_capability()}
    if not torch.cuda.is_available():
        return {"device": "cpu", **cpu}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    return {"device": torch.cuda.get_device_name(), **cpu, "driver": driver_version(), "nccl": nccl}


def compare(stored: Mapping[str, Any], found: Mapping[str, Any], where: str) -> str | None:
    """Refuse a state that gives another loss than the one it was saved with.

    Args:
        stored: as it was measured at the save.
        found: as it was measured after the load.
        where: the checkpoint, for the message.

    Returns:
        A line, if the loss was not finite when the state was saved, and so shows nothing; else None.

    Raises:
        UserError: if they differ at all in the same layout on the same kind of machine, or by more than the wider of
            the two tolerances elsewhere.
    """
    made_by = found["made_by"]
    # The compiler, and whoever measures which kernel is fastest, may choose others at each start, and so another order
    # of sums.
    same = stored["made_by"] == made_by and "compile" not in made_by and "kernels" not in made_by
    bound = 0.0 if same else max(stored["tolerance"], found["tolerance"])
    before, now = stored["loss"], found["loss"]
    if before is None and (now is None or not same):
        gives = "and gives none now" if now is None else f"and gives {now!r} here"
        return (
            f"{where}: its state gave no finite loss on the fixed batch when it was saved, {gives}: that this program "
            "computes what the one that wrote it did is not shown"
        )
    if before is None or now is None or not abs(now - before) <= bound * abs(before):
        allowed = "exactly that, in the same layout" if same else f"that to within {bound:.1e} of it"
        raise UserError(
            f"{where}: its state gives a loss of {_text(now)} on the fixed batch, and gave {_text(before)} "
            f"when it was saved (it should be {allowed}): this program does not compute what the one that wrote it "
            "did; use that version, or start from another checkpoint"
        )
    return None


def _text(loss: float | None) -> str:
    return "no finite number" if loss is None else repr(loss)
