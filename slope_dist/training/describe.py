"""What a run is going to be, in words: printed at its start and by --dry-run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from slope_dist.config import Config, Derived, derive, run_folder
from slope_dist.config.resolve import backward_weight_reason, layout_text, without_effect, zero_stage
from slope_dist.data.corpus import token_file
from slope_dist.data.manifest import read_manifest
from slope_dist.data.prepare import MANIFEST
from slope_dist.errors import UserError
from slope_dist.training.build import StateCount, count_state, stages
from slope_dist.training.forecast import forecast
from slope_dist.training.memory import fit_on_gpu, needs_of
from slope_dist.transfer import size_text


def describe(config: Config, derived: Derived) -> list[str]:
    """Lines of derived values: model, sparsity, batch, layout, state before and after the switch, what has no effect.

    Raises:
        UserError: if `sparsity.dense_layers` names a layer that is not there, or all that are.
    """
    before = count_state(config, derived, adapters=False)
    model, parallel, parameters = config.model, config.parallel, before.parameters
    engine = parallel.engine if parallel.engine == "fsdp" else f"{parallel.engine}, ZeRO {zero_stage(config)}"
    sequence = " with sequence parallelism" if parallel.sequence_parallel and parallel.tensor > 1 else ""
    lines = [
        f"model: {model.family}, {model.num_layers} layers, hidden {model.hidden_size}, {parameters.total:,} "
        f"parameters; trained: {parameters.kept:,} kept in pruned weights + {parameters.dense:,} dense",
        before.summary,
        f"batch: {config.training.global_batch_size} samples x {model.sequence_length} = "
        f"{derived.tokens_per_step:,} tokens a step; micro-batch {config.training.micro_batch_size}, "
        f"accumulation {derived.accumulation_steps}",
        f"ranks: {derived.world_size} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
        f"{derived.data_ranks}; {engine}, {config.precision}{sequence}",
    ]
    if parallel.pipeline > 1:
        lines.append(f"pipeline stages: {stages_text(stages(config, derived))}")
    if config.sparsity.group is not None:
        lines.append(f"backward weight: {derived.backward_weight} ({backward_weight_reason(config)})")
    lines.append(_state_text(before, derived.data_ranks > 1))
    if derived.adapter_steps:
        after = count_state(config, derived, adapters=True)
        lines.append(
            f"adapters: rank {derived.adapter_rank} in the last {derived.adapter_steps} of {config.training.steps} "
            f"steps (from step {derived.first_adapter_step}), {after.parameters.adapters:,} parameters, learning rate: "
            f"{config.adapters.learning_rate_policy}; model state a rank then: {size_text(after.heaviest.bytes)}"
        )
    else:
        lines.append("adapters: none")
    if config.parallel.gpu is None and torch.cuda.is_available():
        # Asked for again by the refusal of what cannot fit, when there are process groups and it is too late to ask.
        forecast(config, derived, on_gpu=True)
    lines += fit_on_gpu(config, derived)
    copy = needs_of(config, derived, on_gpu=torch.cuda.is_available()).copy
    beside = f"are written beside training, from a copy of {size_text(copy)} a rank in host memory"
    lines.append(f"checkpoints {beside if copy else 'are waited for'}")
    lines.append(f"output: {run_folder(config)}")
    lines += [f"note: {line}" for line in without_effect(config)]
    return lines


def describe_alternatives(config: Config) -> list[str]:
    """A line for each of `parallel.alternatives`: the layout, for which ranks, and the model state of the heaviest."""
    lines = []
    for index, alternative in enumerate(config.parallel.alternatives):
        candidate = config.in_layout(alternative)
        derived = derive(candidate)
        state = max(
            count_state(candidate, derived, adapters=adapters).heaviest.bytes
            for adapters in {False, derived.adapter_steps > 0}
        )
        ranks = f"{derived.world_size}" if candidate.parallel.data else f"a multiple of {derived.world_size}"
        lines.append(
            f"alternative [{index}]: {layout_text(candidate)}; ranks: {ranks}; model state a rank: "
            f"{size_text(state)}{'' if candidate.parallel.data else ', less with more data ranks'}"
        )
    return lines


def stages_text(bounds: list[int]) -> str:
    """What each pipeline stage holds, from the bounds of `build.stages`.

    "embedding + 8 layers, 8, 8, 7 layers + head".
    """
    counts = [stop - start for start, stop in pairwise(bounds)]
    # The first of all layers is the embedding and the last the head.
    counts[0] -= 1
    counts[-1] -= 1
    parts = [str(count) for count in counts]
    for index in {0, len(counts) - 1}:
        parts[index] += " layer" if counts[index] == 1 else " layers"
    parts[0] = f"embedding + {parts[0]}"
    parts[-1] += " + head"
    return ", ".join(parts)


def _state_text(count: StateCount, divided: bool) -> str:
    state = count.heaviest
    undivided = "" if divided else ", with one data rank and so not divided"
    which = f", the most, in pipeline stage {count.heaviest_stage + 1}" if len(count.states) > 1 else ""
    kinds = ["weights", "metadata", "transposes", "gradients", "optimizer"]
    if state.kernel_metadata:
        kinds.insert(3, "kernel_metadata")
    parts = ", ".join(f"{kind.replace('_', ' ')} {size_text(getattr(state, kind))}" for kind in kinds)
    return f"model state a rank{which}: {size_text(state.bytes)} ({parts}){undivided}"


def corpus_warning(config: Config) -> str | None:
    """A line if a corpus is absent, saying what a real run would do, or if the model does not know all of its ids."""
    missing = [part.folder for part in config.data.corpora if not is_there(Path(part.folder))]
    if not missing:
        return next(filter(None, (_vocabulary_warning(config, Path(p.folder)) for p in config.data.corpora)), None)
    what = (
        f'it will be prepared from "{config.data.source}" at first use'
        if config.data.source
        else "make it with tools/prepare_data.py"
    )
    return f"warning: no corpus in {', '.join(missing)} yet: {what}"


def _vocabulary_warning(config: Config, folder: Path) -> str | None:
    """What the manifest says; the ids themselves are looked at when a run starts."""
    manifest = read_manifest(folder / MANIFEST) if folder.is_dir() else None
    if manifest is None or manifest["vocab_size"] <= config.model.vocab_size:
        return None
    return (
        f"warning: a run would be refused where it meets an id that the model has not: the tokenizer of {folder} has "
        f"{manifest['vocab_size']} ids, model.vocab_size is {config.model.vocab_size}"
    )


def is_there(folder: Path) -> bool:
    """Whether a corpus can be found by this name."""
    try:
        return token_file(folder, "train").exists()
    except (UserError, OSError):
        return False
