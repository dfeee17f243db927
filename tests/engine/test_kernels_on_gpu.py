"""Training by a GPU's kernels is training by the reference: the same losses, over 200 steps in bf16 and 20 in fp32.

A small OPT of 256 wide, by the real trainer: with a vendor's library preferred wherever it computes rightly, and with
`sparsity.kernels` "reference". On a CPU the same bodies run a few steps with a vendor of plain torch, which in bf16
sums in two rounded halves, so that it differs from the reference by more than a library does.

Run: pytest tests/engine/test_kernels_on_gpu.py -rs -m "slow or gpu"
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_dist.config import Config, Derived, load_config
from slope_dist.engine.fsdp_engine import check_torch
from slope_dist.errors import UserError
from slope_dist.parallel.environment import discover
from slope_dist.sparse import SparseWeight, kernels
from slope_dist.training import products, trainer
from tests.distributed import run_ranks
from tests.runs import relative, step_rows, write_config
from tests.same_run import EXACT
from tests.sparse.kernels.devices import DEVICES
from tests.sparse.kernels.found import VENDORS
from tests.sparse.kernels.vendors import PlainVendor, preferring, vendors

STEPS = {"cuda": 200, "cpu": 12}
FP32_STEPS = 20

BF16 = 2.0**-8
"""Relative, of each step's loss: one rounding of bf16. Of the CPU's vendor, which rounds three times where the
reference rounds once, the losses of 200 steps were off by up to 6e-4, and the mean of the last 50 by 7e-5."""

MEAN = 2.0**-10
"""Of the mean of the last quarter of the losses, in which rounding averages out and a bias would not."""

LEARNING_RATE = 0.0002
"""With ten times as much the loss of this small corpus falls to a tenth, and two runs that differ by rounding alone
part by 9 % in bf16, by 2 % in fp32: that would say nothing of kernels."""

SLOWLY = [pytest.param("cpu", marks=[*DEVICES[0].marks, pytest.mark.slow]), DEVICES[1]]
"""On a CPU, where tests/engine/test_with_kernels.py has more of it in less time, two minutes."""

MODEL = {"hidden_size": 256, "num_layers": 2, "num_heads": 4, "ffn_size": 1024, "sequence_length": 64}


class Halves(PlainVendor):
    """Rounds the sums of two halves of I, and once more their sum, where another algorithm would round once."""

    def product(self, x: Tensor, values: Tensor, *rest: Any, **options: Any) -> Tensor:
        if x.dtype != torch.bfloat16:
            return super().product(x, values, *rest, **options)
        first, second = x.clone(), x.clone()
        first[:, x.shape[1] // 2 :] = 0
        second[:, : x.shape[1] // 2] = 0
        options["addend"] = super().product(first, values, *rest, **options)
        return super().product(second, values, *rest, **{**options, "bias": None})


def train(config: str, preferred: str) -> dict[str, Any]:
    """Train; returns which ways computed something, and how many updates wrote a transpose, or what is missing."""
    os.environ.pop("TRITON_INTERPRET", None)
    made: list[kernels.Dispatcher] = []
    updates: list[int] = []
    adamw_step = SparseWeight.adamw_step

    def counted(self: SparseWeight, *arguments: Any, **options: Any) -> None:
        updates.append(1)
        adamw_step(self, *arguments, **options)

    def start(config: Config, derived: Derived, folder: Path) -> list[str]:
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            dispatcher = products.make_dispatcher(config, folder, device)
        else:
            device = torch.device("cpu")
            dispatcher = kernels.Dispatcher(device, vendors(Halves(name=VENDORS[0])))
        dispatcher._timer = preferring(preferred)
        products.share_choices(dispatcher, products.product_uses(config, derived, device))
        kernels.activate(dispatcher)
        made.append(dispatcher)
        return dispatcher.report()

    loaded = load_config(config)
    if torch.cuda.is_available():
        missing = kernels.find_vendors(torch.device("cuda", 0)).missing
        reason = missing.get(preferred.partition("/")[0].lower())
        if reason is not None:
            return {"missing": f"without {preferred}: {reason}"}
    if loaded.sparsity.kernels == "auto":
        trainer.start_products = start
        SparseWeight.adamw_step = counted  # type: ignore[method-assign]
    trainer.Trainer(loaded, discover()).run()
    return {"labels": sorted({e["label"] for d in made for e in d.as_data().values()}), "updates": len(updates)}


def run(
    folder: Path, corpus: Path, steps: int, preferred: str, how: str, **changes: Any
) -> tuple[list[float], dict[str, Any]]:
    """Losses by step, and what `train` tells."""
    settings = {f"model__{key}": value for key, value in MODEL.items()} | {
        "training__steps": steps,
        "training__learning_rate": LEARNING_RATE,
        "training__min_learning_rate": LEARNING_RATE / 2,
        "adapters__rank": 16,
        "sparsity__kernels": how,
    }
    path = write_config(folder / how, corpus, **settings | changes)
    (told,) = run_ranks(train, 1, str(path), preferred, timeout=500.0)
    if "missing" in told:
        pytest.skip(told["missing"])
    losses = [row["loss"] for row in step_rows(folder / how / "run")]
    assert len(losses) == steps
    return losses, told


@pytest.mark.parametrize("preferred", [f"{vendor}/1" for vendor in VENDORS])
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
@pytest.mark.parametrize("device", SLOWLY)
def test_bf16(device: str, engine: str, preferred: str, corpus: Path, tmp_path: Path) -> None:
    if device == "cpu" and preferred != f"{VENDORS[0]}/1":
        pytest.skip("one vendor of plain torch is enough")
    if engine == "fsdp":
        try:
            check_torch()
        except UserError as error:
            pytest.skip(str(error))
    changes = {"precision": "bf16", "parallel__engine": engine} | (
        {"parallel__zero_stage": 1} if engine == "deepspeed" else {}
    )
    found, told = run(tmp_path, corpus, STEPS[device], preferred, "auto", **changes)
    expected, _ = run(tmp_path, corpus, STEPS[device], preferred, "reference", **changes)
    assert any(preferred in label for label in told["labels"]), told
    assert found != expected, "the reference was compared with itself"
    apart = [relative(mine, other) for mine, other in zip(found, expected, strict=True)]
    assert max(apart) <= BF16, apart
    last = max(1, len(found) // 4)
    assert relative(sum(found[-last:]), sum(expected[-last:])) <= MEAN, apart
    assert expected[-1] < expected[0], "nothing was learned that could differ"


@pytest.mark.parametrize("device", SLOWLY)
def test_fp32_with_transposes_that_the_optimizer_writes(device: str, corpus: Path, tmp_path: Path) -> None:
    """ZeRO 0: fp32 weights are whole, so AdamW's kernel writes values and transposes in one pass."""
    changes = {"precision": "fp32", "parallel__zero_stage": 0, "sparsity__backward_weight": "resident"}
    found, told = run(tmp_path, corpus, FP32_STEPS, "expand", "auto", **changes)
    expected, _ = run(tmp_path, corpus, FP32_STEPS, "expand", "reference", **changes)
    assert told["updates"] >= FP32_STEPS, told
    # Ten steps of rounding stay within EXACT everywhere else.
    bound = EXACT * FP32_STEPS / 10
    apart = [relative(mine, other) for mine, other in zip(found, expected, strict=True)]
    assert max(apart) <= bound, apart
