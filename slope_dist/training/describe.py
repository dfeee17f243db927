"""What a run is going to be, in words: printed at its start and by --dry-run."""

from __future__ import annotations

from pathlib import Path

from slope_dist.config import Config, Derived, run_folder
from slope_dist.config.resolve import without_effect, zero_stage
from slope_dist.training.build import count_state
from slope_dist.training.progress import size_text


def describe(config: Config, derived: Derived) -> list[str]:
    """Lines of derived values: model, sparsity, batch, ranks, state before and after the switch."""
    before, summary = count_state(config, derived, adapters=False)
    model = config.model
    lines = [
        f"model: {model.family}, {model.num_layers} layers, hidden {model.hidden_size}, {before.total:,} parameters; "
        f"trained: {before.kept:,} kept in pruned weights + {before.dense:,} dense",
        summary,
        f"batch: {config.training.global_batch_size} samples x {model.sequence_length} = "
        f"{derived.tokens_per_step:,} tokens a step; micro-batch {config.training.micro_batch_size}, "
        f"accumulation {derived.accumulation_steps}",
        f"ranks: {derived.world_size} = tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x data "
        f"{derived.data_ranks}; {config.parallel.engine}, ZeRO {zero_stage(config)}, {config.precision}, "
        f"backward weight {derived.backward_weight}",
        f"model state a rank: {size_text(before.bytes)} (weights {size_text(before.weights)}, metadata "
        f"{size_text(before.metadata)}, transposes {size_text(before.transposes)}, gradients "
        f"{size_text(before.gradients)}, optimizer {size_text(before.optimizer)})",
    ]
    if derived.adapter_steps:
        after, _ = count_state(config, derived, adapters=True)
        lines.append(
            f"adapters: rank {derived.adapter_rank} in the last {derived.adapter_steps} of {config.training.steps} "
            f"steps (from step {derived.first_adapter_step}), learning rate: "
            f"{config.adapters.learning_rate_policy}; model state a rank then: {size_text(after.bytes)}"
        )
    else:
        lines.append("adapters: none")
    lines.append(f"output: {run_folder(config)}")
    lines += [f"note: {line}" for line in without_effect(config)]
    return lines


def corpus_warning(config: Config) -> str | None:
    """A line if the corpus is absent, saying what a real run would do."""
    if (Path(config.data.folder) / "train.bin").exists():
        return None
    what = (
        f'it will be prepared from "{config.data.source}" at first use'
        if config.data.source
        else "make it with tools/prepare_data.py"
    )
    return f"warning: no corpus in {config.data.folder} yet: {what}"
