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
from slope_dist.parallel.groups import start as start_groups
from slope_dist.parallel.layout import Layout
from slope_dist.planning import GPU_MEMORY
from slope_dist.training import memory as memory_module
from slope_dist.training.build import count_state
from slope_dist.training.describe import corpus_warning, describe, stages_text
from slope_dist.training.forecast import MARGIN, forecast
from slope_dist.training.memory import fit_on_gpu, needs_of, refuse_what_will_not_fit
from slope_dist.transfer import size_text
from tests.distributed import run_ranks
from tests.runs import VOCAB_SIZE, small_corpus, write_config

ALONE = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


def weigh(path: str, adapters: bool) -> dict[str, int]:
    """Bytes of this rank's weights, metadata, kept transposes and optimizer state after a step."""
    from slope_dist.layers import logical_tensors
    from slope_dist.training.build import build_engine

    config = load_config(path)
    derived = derive(config, discover().world_size)
    parallel = config.parallel
    groups = start_groups(Layout(parallel.tensor, derived.data_ranks, parallel.pipeline))
    engine: Any = build_engine(config, derived, groups, adapters=adapters)
    tokens = torch.arange(2 * 17).view(2, 17) % VOCAB_SIZE
    engine.train_step([(tokens[:, :-1], tokens[:, 1:])] * derived.accumulation_steps)
    engine.evaluate((tokens[:, :-1], tokens[:, 1:]))

    fsdp = parallel.engine == "fsdp"

    def size(tensor: Any) -> int:
        held = tensor.to_local() if fsdp else tensor.ds_tensor if engine.stage == 3 else tensor
        return held.numel() * held.element_size()

    tensors = list(logical_tensors(engine.module))
    parameters = engine.optimizer_parameters() if fsdp else engine._state.flat_parameters()
    flat = [tensor for members in parameters.values() for tensor in members]
    moments = [engine._adam.state[tensor][name] for tensor in flat for name in ("exp_avg", "exp_avg_sq")]
    masters = [] if fsdp or engine.stage == 0 else flat
    for weight in engine._sparse:
        if weight.resident_transpose:
            weight.transpose()
    return {
        "weights": sum(size(tensor.tensor) for tensor in tensors if tensor.trained),
        "metadata": sum(size(tensor.tensor) for tensor in tensors if not tensor.trained),
        "transposes": sum(t.numel() * t.element_size() for w in engine._sparse for t in w.cached_tensors()),
        "optimizer": sum(t.numel() * t.element_size() for t in [*moments, *masters]),
        "saved": sum(piece.tensor.nbytes for piece in engine.export_state()[0] if piece.write),
        "stage": groups.position.pipeline,
    }


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("fp32", {"zero_stage": 0}),
        ("bf16", {"zero_stage": 1}),
        ("fp32", {"zero_stage": 2}),
        ("bf16", {"zero_stage": 3}),
        ("bf16", {"zero_stage": 1, "tensor": 2}),
        ("fp32", {"zero_stage": 0, "pipeline": 2}),
        ("bf16", {"zero_stage": 1, "pipeline": 2}),
        ("bf16", {"engine": "fsdp"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}-{v}" for k, v in value.items()),
)
def test_promised_bytes_are_there(precision: str, parallel: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    # A vocabulary that does not divide over tensor ranks, and is padded.
    path = write_config(
        tmp_path,
        corpus,
        model__vocab_size=VOCAB_SIZE + 8,
        precision=precision,
        parallel={"zero3_persistence_threshold": 0} | parallel,
        sparsity__column_mask_interval=2,
    )
    config = load_config(path)
    for adapters in (False, True):
        count = count_state(config, derive(config, 2), adapters=adapters)
        written: list[float] = []
        for found in run_ranks(weigh, 2, str(path), adapters):
            state = count.states[found.pop("stage")]
            written.append(found.pop("saved") / state.saved)
            for name, size in found.items():
                # Shares are padded to equal sizes.
                assert 0 <= size - getattr(state, name) <= 0.01 * size, name
            assert state.metadata > 0
            assert (state.transposes > 0) == (parallel.get("zero_stage") == 0)
        # What tensor ranks or stages hold in common one of them writes; shares differ by a row.
        assert 0.9 < max(written) <= 1.01


def test_run_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU its memory counts, which cannot be set here")
    large: dict[str, Any] = {"model__hidden_size": 256, "checkpoint": {"asynchronous": False}}
    config = load_config(write_config(tmp_path, tmp_path, adapters__rank=256, **large))
    derived = derive(config)
    before, after = (count_state(config, derived, adapters=flag).heaviest for flag in (False, True))
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
    without = load_config(write_config(tmp_path, tmp_path, adapters__rank=0, **large))
    memory(before.bytes)
    refuse_what_will_not_fit(without, derive(without), ALONE)
    memory(before.bytes - 1)
    with pytest.raises(UserError, match="the model state takes"):
        refuse_what_will_not_fit(without, derive(without), ALONE)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_copy_of_a_save_is_counted(asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU its memory counts, which cannot be set here")
    path = write_config(tmp_path, tmp_path, adapters__rank=0, checkpoint={"asynchronous": asynchronous})
    config = load_config(path)
    needs = needs_of(config, derive(config), on_gpu=False)
    assert (needs.copy > 0) == asynchronous
    there = needs.most + needs.copy
    monkeypatch.setattr(memory_module, "_machine_memory", lambda: there)
    refuse_what_will_not_fit(config, derive(config), ALONE)
    there -= 1
    with pytest.raises(UserError, match="checkpoint.asynchronous false" if asynchronous else "the model state"):
        refuse_what_will_not_fit(config, derive(config), ALONE)
    line = next(line for line in describe(config, derive(config)) if line.startswith("checkpoints "))
    assert line.endswith("are waited for") != asynchronous and (size_text(needs.copy) in line) == asynchronous


@pytest.mark.parametrize("asynchronous", [True, False])
def test_on_a_gpu_the_state_of_the_switch_waits_in_host_memory(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path, tmp_path, checkpoint={"asynchronous": asynchronous}))
    derived = derive(config)
    needs = needs_of(config, derived, on_gpu=True)
    assert needs.switch == needs.after
    assert needs.waiting == count_state(config, derived, adapters=False).heaviest.carried > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needs.most, needs.most))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    # Predicted peaks are more than the state alone, which is what this card has room for.
    monkeypatch.setattr(memory_module, "_certain_peaks", lambda *_: {})
    there = needs.waiting + needs.copy
    monkeypatch.setattr(memory_module, "_machine_memory", lambda: there)
    refuse_what_will_not_fit(config, derived, ALONE)
    there -= 1
    advice = "set checkpoint.asynchronous false, or use more ranks" if asynchronous else "use more ranks"
    with pytest.raises(UserError, match=f"for the state that waits while adapters join, and there are .*; {advice}$"):
        refuse_what_will_not_fit(config, derived, ALONE)


def fit(tmp_path: Path, ranks: int, **changes: Any) -> str:
    """What a run of three billion parameters says of its GPU; empty where it names none."""
    sizes = {"model__hidden_size": 4096, "model__ffn_size": 16384, "model__num_layers": 16}
    path = write_config(tmp_path, tmp_path, precision="bf16", **{**sizes, "adapters__rank": 512} | changes)
    config = load_config(path)
    return "".join(fit_on_gpu(config, derive(config, ranks)))


def test_a_gpu_that_is_named_is_compared_with(tmp_path: Path) -> None:
    assert fit(tmp_path, 1) == ""
    gpu = {"parallel": {"gpu": "a100-40gb", "zero_stage": 1}}
    said = fit(tmp_path, 1, **gpu)
    config = load_config(tmp_path / "config.json")
    [stage] = forecast(config, derive(config), on_gpu=True)
    assert stage.switch is not None and stage.after is not None
    # It would fit until the adapters join; that they do, with the state in host memory, takes less than what follows.
    assert MARGIN * stage.before.bytes < GPU_MEMORY["a100-40gb"] < stage.after.bytes
    assert 0 < stage.waiting < stage.states[0].bytes and stage.switch < stage.after.bytes
    for part in (
        "warning: does not fit, with 1 data rank, on a100-40gb with 37.25 GiB",
        f"{size_text(stage.before.bytes)} a rank at the peak before the adapters",
        f"{size_text(stage.after.bytes)} with them",
        f"{size_text(stage.waiting)} of the host while they join; predicted, and 15% of the peak is to stay free",
        "2 data ranks (2 ranks in all) would fit",
    ):
        assert part in said
    assert fit(tmp_path, 2, **gpu).startswith("fits on a100-40gb")
    assert fit(tmp_path, 1, parallel={"gpu": "a100-80gb"}).startswith("fits on a100-80gb")
    # What would fit is a whole layout, and one that the batch of 8 in micro-batches of 2 allows.
    halves = {"parallel": gpu["parallel"] | {"tensor": 2}, "model__num_layers": 44}
    assert "4 data ranks (8 ranks in all) would fit" in fit(tmp_path, 2, **halves)
    huge = {"parallel": gpu["parallel"], "model__num_layers": 100}
    assert "no number of data ranks would fit; raise parallel.tensor" in fit(tmp_path, 1, **huge)


def test_without_adapters_there_is_no_switch(tmp_path: Path) -> None:
    said = fit(tmp_path, 1, adapters__rank=0, parallel={"gpu": "a100-40gb"})
    assert said.startswith("fits on a100-40gb") and "join" not in said


def test_description_names_what_the_run_will_be(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path / "nowhere"))
    text = "\n".join(describe(config, derive(config, 2)))
    assert "sparse 9/12 linears; dense: decoder.layers.0.self_attn.q_proj" in text
    assert "8 samples x 16 = 128 tokens a step; micro-batch 2, accumulation 2" in text
    assert "ranks: 2 = tensor 1 x pipeline 1 x data 2" in text
    assert "adapters: rank 8 in the last 5 of 10 steps (from step 6)" in text
    assert str(tmp_path / "run") in text
    assert "parameters; trained: " in text and "kept in pruned weights" in text
    assert "deepspeed, ZeRO 1, fp32" in text and "sequence parallel" not in text
    assert "backward weight: derived (auto: ZeRO 1 splits the optimizer state over the data ranks)" in text
    assert "pipeline stages" not in text
    warning = corpus_warning(config)
    assert warning is not None and str(tmp_path / "nowhere") in warning


def test_a_dry_run_says_that_a_model_does_not_know_all_ids_of_its_corpus(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    assert corpus_warning(load_config(write_config(tmp_path, corpus))) is None
    warning = corpus_warning(load_config(write_config(tmp_path, corpus, model__vocab_size=256)))
    assert warning is not None and f"the tokenizer of {corpus} has 512 ids, model.vocab_size is 256" in warning


def test_description_of_a_layout(tmp_path: Path) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "zero_stage": 0}
    config = load_config(write_config(tmp_path, tmp_path, model__num_layers=5, parallel=parallel))
    derived = derive(config, 8)
    text = "\n".join(describe(config, derived))
    assert "ranks: 8 = tensor 2 x pipeline 2 x data 2; deepspeed, ZeRO 0, fp32 with sequence parallelism" in text
    assert "pipeline stages: embedding + 2 layers, 3 layers + head" in text
    assert "backward weight: resident (auto: at ZeRO 0 each rank holds the optimizer state of its share" in text
    before, after = (count_state(config, derived, adapters=flag) for flag in (False, True))
    stage = before.heaviest_stage
    assert [state.bytes <= before.states[stage].bytes for state in before.states] == [True, True]
    assert f"in pipeline stage {stage + 1}: {size_text(before.states[stage].bytes)} (weights " in text
    assert f"model state a rank then: {size_text(max(state.bytes for state in after.states))}" in text
    # The model is the same whatever its layout.
    alone = load_config(write_config(tmp_path, tmp_path, model__num_layers=5))
    assert describe(alone, derive(alone))[0] == text.splitlines()[0]


def test_description_of_fsdp_names_no_zero_stage(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path, parallel={"engine": "fsdp"}, precision="bf16"))
    text = "\n".join(describe(config, derive(config, 2)))
    assert "x data 2; fsdp, bf16" in text and "ZeRO" not in text
    assert "backward weight: derived (auto: fsdp splits weights and optimizer state over the data ranks)" in text


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ([0, 10, 18, 26, 35], "embedding + 9 layers, 8, 8, 8 layers + head"),
        ([0, 2, 4], "embedding + 1 layer, 1 layer + head"),
        ([0, 6], "embedding + 4 layers + head"),
    ],
)
def test_stages_in_words(bounds: list[int], said: str) -> None:
    assert stages_text(bounds) == said
