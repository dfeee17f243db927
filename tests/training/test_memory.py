"""The model state that is promised before a run is what its tensors take, and a run that cannot fit is refused.

Gradients are not weighed: DeepSpeed frees them inside a step.

Run: pytest tests/training/test_memory.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slope_dist.config import derive, load_config
from slope_dist.errors import UserError
from slope_dist.parallel.environment import Environment, discover
from slope_dist.training.build import count_state
from slope_dist.training.describe import corpus_warning, describe
from slope_dist.training.memory import refuse_what_will_not_fit
from tests.distributed import run_ranks
from tests.runs import VOCAB_SIZE, write_config

ALONE = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


def weigh(path: str, adapters: bool) -> dict[str, int]:
    """Bytes of this rank's weights, metadata, kept transposes and optimizer state after a step."""
    from slope_dist.layers import logical_tensors
    from slope_dist.training.build import build_engine

    config = load_config(path)
    derived = derive(config, discover().world_size)
    engine: Any = build_engine(config, derived, adapters=adapters)
    tokens = torch.arange(2 * 17).view(2, 17) % VOCAB_SIZE
    engine.train_step([(tokens[:, :-1], tokens[:, 1:])] * derived.accumulation_steps)
    engine.evaluate((tokens[:, :-1], tokens[:, 1:]))

    def size(tensor: Any) -> int:
        held = tensor.ds_tensor if engine.stage == 3 else tensor
        return held.numel() * held.element_size()

    tensors = list(logical_tensors(engine.module))
    flat = [tensor for members in engine._state.flat_parameters().values() for tensor in members]
    moments = [engine._adam.state[tensor][name] for tensor in flat for name in ("exp_avg", "exp_avg_sq")]
    masters = [] if engine.stage == 0 else flat
    for weight in engine._sparse:
        if weight.resident_transpose:
            weight.transpose()
    return {
        "weights": sum(size(tensor.tensor) for tensor in tensors if tensor.trained),
        "metadata": sum(size(tensor.tensor) for tensor in tensors if not tensor.trained),
        "transposes": sum(t.numel() * t.element_size() for w in engine._sparse for t in w._transpose or ()),
        "optimizer": sum(t.numel() * t.element_size() for t in [*moments, *masters]),
    }


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_promised_bytes_are_there(stage: int, precision: str, corpus: Path, tmp_path: Path) -> None:
    path = write_config(
        tmp_path, corpus, precision=precision, parallel__zero_stage=stage, sparsity__column_mask_interval=2
    )
    config = load_config(path)
    for adapters in (False, True):
        state, _ = count_state(config, derive(config, 2), adapters=adapters)
        for found in run_ranks(weigh, 2, str(path), adapters):
            for name, size in found.items():
                # Shares are padded to equal sizes.
                assert 0 <= size - getattr(state, name) <= 0.01 * size, name
    assert state.metadata > 0
    assert (state.transposes > 0) == (stage == 0)


def test_run_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU its memory counts, which cannot be set here")
    config = load_config(write_config(tmp_path, tmp_path, model__hidden_size=256, adapters__rank=256))
    derived = derive(config)
    before, after = (count_state(config, derived, adapters=flag)[0] for flag in (False, True))
    # What waits while the new engine is built: the old optimizer's state and the metadata, never trained again.
    switch = after.bytes + before.optimizer + before.metadata

    def memory(total: int) -> None:
        class Memory:
            pass

        made: Any = Memory()
        made.total = total
        monkeypatch.setattr(psutil, "virtual_memory", lambda: made)

    memory(switch)
    refuse_what_will_not_fit(config, derived, ALONE)
    # The phases fit, the way from one to the other does not: refused before the first step.
    memory(switch - 1)
    assert switch - 1 > after.bytes
    with pytest.raises(UserError, match="the switch to adapters"):
        refuse_what_will_not_fit(config, derived, ALONE)
    memory(2 * switch - 1)
    with pytest.raises(UserError, match="for each local rank"):
        refuse_what_will_not_fit(config, derived, Environment(0, 2, 0, 2, "deepspeed or torchrun"))
    without = load_config(write_config(tmp_path, tmp_path, model__hidden_size=256, adapters__rank=0))
    memory(before.bytes)
    refuse_what_will_not_fit(without, derive(without), ALONE)
    memory(before.bytes - 1)
    with pytest.raises(UserError, match="the model state takes"):
        refuse_what_will_not_fit(without, derive(without), ALONE)


def test_description_names_what_the_run_will_be(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path / "nowhere"))
    text = "\n".join(describe(config, derive(config, 2)))
    assert "sparse 9/12 linears; dense: decoder.layers.0.self_attn.q_proj" in text
    assert "8 samples x 16 = 128 tokens a step; micro-batch 2, accumulation 2" in text
    assert "ranks: 2 = tensor 1 x pipeline 1 x data 2" in text
    assert "adapters: rank 8 in the last 5 of 10 steps (from step 6)" in text
    assert str(tmp_path / "run") in text
    warning = corpus_warning(config)
    assert warning is not None and str(tmp_path / "nowhere") in warning
