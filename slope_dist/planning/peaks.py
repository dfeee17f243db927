"""The most memory of a rank while it trains: model state, what its engine takes beside it, and activations.

What engines take follows from their code (DeepSpeed 0.19, FSDP2 of torch) and is checked by running them
(tests/planning/test_memory.py). All sizes are bytes unless they are said to be elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slope_dist.planning.activations import Layer
from slope_dist.planning.model_state import ModelState, ShareSize

Kind = Literal["whole", "bf16", "zero 1", "zero 2", "zero 3", "fsdp"]
"""Who holds gradients and optimizer state: torch, DeepSpeed's BF16_Optimizer, its ZeRO stages, FSDP2."""

_ALL_REDUCE = 500_000_000
"""Elements up to which DeepSpeed joins gradients before it reduces them, where no bucket is set."""

_SUB_GROUP = 1_000_000_000
"""Elements that DeepSpeed's ZeRO 3 updates at a time (`sub_group_size`)."""


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """What one layer holds on a tensor rank.

    Attributes:
        trained: elements.
        metadata: bytes.
        largest: elements of its largest trained tensor.
    """

    trained: int
    metadata: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class EngineSetting:
    """What decides on an engine's memory beside the model.

    Attributes:
        kind: who holds gradients and optimizer state.
        width: bytes of a parameter while it is computed with.
        gradient_width: bytes of an element that is accumulated.
        data_ranks: that share the state.
        bucket: elements of DeepSpeed's buckets.
        gathered_ahead: elements that ZeRO 3 gathers before they are needed.
        accumulation: micro-batches of a step.
        fused: whether Adam needs no temporary tensors, as on GPUs.
        recompute: whether blocks run again in backward.
        overlap: whether gradients travel during backward, as on GPUs.
    """

    kind: Kind
    width: int
    gradient_width: int
    data_ranks: int
    bucket: int
    gathered_ahead: int
    accumulation: int
    fused: bool
    recompute: bool
    overlap: bool


@dataclass(frozen=True, kw_only=True)
class Peak:
    """A rank at its fullest.

    Attributes:
        state: of it, what stays between steps.
        buffers: gradients on their way, gathered parameters, temporary copies.
        activations: what forward has left, and what runs needs.
        moment: when that is.
        passes: the most of all moments until the optimizer updates.
    """

    state: int
    buffers: int
    activations: int
    moment: str
    passes: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.state + self.buffers + self.activations


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The layers of one rank, in order, with what they take.

    Attributes:
        layers: activations of each.
        sizes: of each.
        pipelined: whether there are other stages.
        in_flight: micro-batches whose activations are there at once.
        received: bytes that each of them takes beside what the layers save.
        buffers: bytes in which tensors come from other stages, and outputs that outlive their use.
    """

    layers: Sequence[Layer]
    sizes: Sequence[LayerSize]
    pipelined: bool = False
    in_flight: int = 1
    received: int = 0
    buffers: int = 0


def resting(state: ModelState, setting: EngineSetting) -> int:
    """Bytes that stay between steps: DeepSpeed's gradients do so in some of its optimizers alone."""
    kept = setting.kind in ("bf16", "zero 3")
    bucket = setting.bucket * setting.gradient_width if setting.kind == "zero 3" else 0
    # Transposes are made anew in every step.
    return state.bytes - state.transposes - (0 if kept else state.gradients) + bucket


def peak(share: ShareSize, state: ModelState, setting: EngineSetting, stage: Stage) -> Peak:
    """The fullest moment of a step."""
    rest = resting(state, setting) + state.transposes
    moments = list(_training(share, setting, stage))
    moments += [(buffers + stage.buffers, 0, moment) for buffers, moment in _update(share, setting, stage)]
    buffers, activations, moment = max(moments, key=lambda found: found[0] + found[1])
    passes = max(buffers + activations for buffers, activations, moment in moments if moment != "update")
    return Peak(state=rest, buffers=buffers, activations=activations, moment=moment, passes=rest + passes)


def _training(share: ShareSize, setting: EngineSetting, stage: Stage) -> Iterator[tuple[int, int, str]]:
    """(buffers, activations, moment) of each layer's forward and backward."""
    layers, sizes = stage.layers, stage.sizes
    last = len(layers) - 1
    waiting = (stage.in_flight - 1) * sum(layer.saved for layer in layers)
    alive = waiting + stage.in_flight * stage.received + stage.buffers
    for index, layer in enumerate(layers):
        whole = _gathered(setting, sizes, index)
        yield _gradients(share, setting, 0) + whole, alive + layer.forward, "forward"
        later = sum(size.trained for size in sizes[index:])
        buffers = _gradients(share, setting, later) + whole
        if not stage.pipelined:
            # A pipeline reduces after its last backward.
            buffers += _buckets(setting)
        if setting.kind == "fsdp":
            running, after = _fsdp_backward(setting, sizes, index)
            yield buffers + after, alive + layer.given, "backward"
            buffers += running
        alive += layer.saved
        yield buffers, alive + layer.backward, "backward"
        if index < last and not stage.pipelined:
            # The head is fullest before its own gradient arrives. A block that is computed again is so when its first
            # gradients arrive, which are then reduced; another is then as forward has left it. ZeRO 3 reduces at once.
            is_begun = setting.kind == "zero 2" and not setting.recompute
            reducing = layer.given if is_begun else layer.backward
            yield buffers + _reduced(setting, sizes), alive + reducing, "backward"


def _gradients(share: ShareSize, setting: EngineSetting, arrived: int) -> int:
    """Gradients that wait for the end of the step, and of which `arrived` elements are there in the first backward."""
    there = share.trained if setting.accumulation > 1 else arrived
    if setting.kind == "zero 1" and setting.gradient_width > setting.width:
        return there * setting.gradient_width
    if setting.kind in ("whole", "zero 1"):
        return there * setting.width
    if setting.kind == "zero 2" and setting.width == setting.gradient_width:
        # Those of a micro-batch gather beside those of the ones before.
        before = share.trained if setting.accumulation > 1 else 0
        return -(-(before + arrived) // setting.data_ranks) * setting.gradient_width
    if setting.kind == "zero 2" and there:
        return -(-share.trained // setting.data_ranks) * setting.gradient_width
    if setting.kind == "fsdp" and there:
        return -(-share.trained // setting.data_ranks) * 4
    return 0


def _buckets(setting: EngineSetting) -> int:
    """Buffers that wait for gradients from the beginning of backward."""
    widths = {"zero 1": setting.gradient_width, "zero 2": setting.width}
    return setting.bucket * widths.get(setting.kind, 0) * (1 + setting.overlap)


def _reduced(setting: EngineSetting, sizes: Sequence[LayerSize]) -> int:
    """What a bucket is copied to while it is reduced."""
    bucket = min(setting.bucket, sum(size.trained for size in sizes))
    widens = setting.kind == "zero 2" and setting.width != setting.gradient_width
    return bucket * setting.gradient_width if widens or setting.kind == "zero 3" else 0


def _gathered(setting: EngineSetting, sizes: Sequence[LayerSize], index: int) -> int:
    """Parameters that are whole while a layer runs."""
    width = setting.width
    if setting.kind == "zero 3":
        return (sizes[index].largest + setting.gathered_ahead) * width
    if setting.kind == "fsdp":
        root = _whole(sizes[0], width) + _whole(sizes[-1], width)
        own = _whole(sizes[index], width) if 0 < index < len(sizes) - 1 else 0
        # What the last block was gathered in stays until the next forward, which may be one that is computed again.
        return root + own + (0 if setting.recompute else _whole(sizes[-2], width))
    return 0


def _whole(size: LayerSize, width: int) -> int:
    return size.trained * width + size.metadata


def _fsdp_backward(setting: EngineSetting, sizes: Sequence[LayerSize], index: int) -> tuple[int, int]:
    """What FSDP2 takes beside whole parameters while a layer's backward runs, and when it reduces the gradients."""
    ranks, last = setting.data_ranks, len(sizes) - 1
    own = sizes[index].trained
    # The next block to run backward is gathered meanwhile: on GPUs, and where blocks are computed again.
    ahead = (setting.overlap or setting.recompute) and 1 < index < last
    before = _whole(sizes[index - 1], setting.width) if ahead else 0
    # The memory from which gradients were reduced last stays until the next are.
    reduced = sizes[index + 1].trained * setting.gradient_width if index + 1 < last else 0
    # On CPUs, gloo reduces a copy.
    copies = 1 if setting.overlap or ranks == 1 else 2
    after = (copies * own + -(-own // ranks)) * setting.gradient_width + before
    # Its parameters are let go before.
    return before + reduced, after - (_whole(sizes[index], setting.width) if 0 < index < last else 0)


def _update(share: ShareSize, setting: EngineSetting, stage: Stage) -> Iterator[tuple[int, str]]:
    """(buffers, moment) of what comes after the last backward."""
    part = -(-share.trained // setting.data_ranks)
    group = -(-max(share.groups) // setting.data_ranks)
    width = setting.gradient_width
    if setting.kind == "whole":
        joined = share.trained if share.trained <= _ALL_REDUCE else _ALL_REDUCE + share.largest
        yield share.trained * 4 + joined * 4, "reduction"
        yield share.trained * 4 + (0 if setting.fused else 2 * share.largest * 4), "update"
    elif setting.kind == "bf16":
        # One group alone is reduced where it lies.
        yield share.trained * width if max(share.groups) <= _ALL_REDUCE else 0, "reduction"
        yield 0 if setting.fused else 2 * group * 4, "update"
    elif setting.kind in ("zero 1", "zero 2"):
        # In another dtype than the parameters' they are gathered in one buffer from the first.
        one_dtype = width == setting.width
        there = share.trained + part if setting.kind == "zero 1" else part * (1 + one_dtype)
        bucket = _buckets(setting) + (_reduced(setting, stage.sizes) if stage.pipelined else 0)
        yield there * width + bucket, "reduction"
        if width < 4:
            # Narrow ones are joined, and then widened, one group at a time.
            yield part * width + group * (width + 4), "widening"
        yield part * (4 + one_dtype * width) + (0 if setting.fused else 2 * group * 4), "update"
    elif setting.kind == "zero 3":
        at_once = min(group, _SUB_GROUP)
        yield min(part, _SUB_GROUP) * 4 + (0 if setting.fused else 2 * at_once * 4), "update"
    else:
        largest = -(-share.largest // setting.data_ranks)
        yield part * 4 + (0 if setting.fused else 2 * largest * 4), "update"
