"""The time of a training step on GPUs, by arithmetic.

What is modelled: the products of every layer, attention, what passes through memory between them, making transposes,
the optimizer, the collectives of traffic.py over links of given bandwidths, and the pipeline's fill and drain. What is
not: host time and the launch of kernels, latency of small collectives, kernels that share a GPU, power limits,
stragglers, reading data, evaluation and checkpoints.

Shape letters: T tokens of a micro-batch, S of a sequence, H features, F of the feed-forward, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from torch import nn

from slope_dist.config import Config, Derived
from slope_dist.config.resolve import has_bf16_optimizer, zero_stage
from slope_dist.layers.linear import Linear
from slope_dist.layers.modules import Head
from slope_dist.planning.cluster import Cluster
from slope_dist.planning.gpus import Peaks
from slope_dist.planning.model_state import ShareSize
from slope_dist.planning.products import Kind, Product, ProductTimes
from slope_dist.planning.traffic import WIDTH, Message, group_of, messages
from slope_dist.sparse import SparseWeight

ATTENTION_SHARE = 0.5
"""The share of the dense peak that flash attention is taken to reach. An assumption."""

_ATTENTION_BACKWARD = 2.5
"""Flash attention's backward beside its forward: five products beside two."""

_STREAM_PASSES, _STREAM_PASSES_BACK = 10, 14
"""Times that [T, H] goes through memory in a block beside the products: each of two norms reads and writes it, each of
two residual sums reads two and writes one; backward the same with one more operand each."""

_LOSS_PASSES = 6
"""Times that fp32 [T, V] goes through memory in the loss and its gradient."""

_TRAINED: tuple[Kind, ...] = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Seconds of one micro-batch, forward and backward, on one rank.

    Attributes:
        products: of linears, head and adapters.
        attention: scores and mixed values.
        memory: norms, sums, activations, the loss.
        transposes: doubly pruned, where they are made for every backward.
    """

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    transposes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Machine:
    """What work is timed on: products, and the card's peaks for the rest."""

    times: ProductTimes
    peaks: Peaks


def block_work(block: nn.Module, config: Config, machine: Machine, *, resident: bool) -> Work:
    """A micro-batch through one block of a rank's share, which may be on the meta device."""
    model, width, ranks = config.model, WIDTH[config.precision], config.parallel.tensor
    tokens = config.training.micro_batch_size * model.sequence_length
    # What backward needs again it computes again.
    again = 2 if config.training.recompute == "blocks" else 1
    features = model.hidden_size // ranks
    # Causality hides half of the scores.
    attention = 2 * tokens * model.sequence_length * features / (machine.peaks.dense * ATTENTION_SHARE)
    stream = tokens * model.hidden_size * width // (ranks if config.parallel.sequence_parallel else 1)
    inner = tokens * model.ffn_size * width // ranks * (3 if model.family in ("llama", "mistral") else 2)
    forward, backward = _STREAM_PASSES * stream + inner, _STREAM_PASSES_BACK * stream + 2 * inner
    work = Work(
        attention=attention * (again + _ATTENTION_BACKWARD),
        memory=_through_memory(again * forward + backward, machine),
    )
    return sum((_linear(linear, tokens, width, again, machine, resident) for linear in _linears(block)), work)


def edge_work(edge: nn.Module, config: Config, machine: Machine) -> Work:
    """A micro-batch through the embedding, or through the head and the loss."""
    width = WIDTH[config.precision]
    tokens = config.training.micro_batch_size * config.model.sequence_length
    work = sum((_linear(linear, tokens, width, 1, machine, True) for linear in _linears(edge)), Work())
    heads = [module for module in edge.modules() if isinstance(module, Head)]
    for head in heads:
        rows, columns = head.weight.shape
        work += Work(
            products=_products(machine.times, tokens, rows, columns, 1, sparse=False),
            memory=_through_memory(_LOSS_PASSES * 4 * tokens * rows, machine),
        )
    if not heads:
        # Rows of the table are read and written, and their gradients added.
        work += Work(memory=_through_memory(5 * tokens * config.model.token_embedding_size * width, machine))
    return work


def _linears(layer: nn.Module) -> list[Linear]:
    return [module for module in layer.modules() if isinstance(module, Linear)]


def _linear(linear: Linear, tokens: int, width: int, again: int, machine: Machine, resident: bool) -> Work:
    weight, transposes = linear.weight, 0.0
    rows, columns = weight.shape
    sparse = isinstance(weight, SparseWeight) and weight.pattern.is_two_four
    products = _products(machine.times, tokens, rows, columns, again, sparse=sparse)
    if isinstance(weight, SparseWeight) and not resident:
        transposes = _through_memory(2 * (weight.values.numel() * width + weight.indices.numel()), machine)
    if linear.adapter is not None:
        for factor in (linear.adapter.down, linear.adapter.up):
            rank_rows, rank_columns = factor.shape
            products += _products(machine.times, tokens, rank_rows, rank_columns, again, sparse=False)
    return Work(products=products, transposes=transposes)


def _products(times: ProductTimes, tokens: int, rows: int, columns: int, again: int, *, sparse: bool) -> float:
    each = {kind: times.seconds(Product(kind, tokens, rows, columns, sparse)) for kind in _TRAINED}
    return sum(each.values()) + (again - 1) * each["forward"]


def _through_memory(size: float, machine: Machine) -> float:
    return size / machine.peaks.bandwidth


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step; they add up to `total`.

    Attributes:
        products, attention, memory, transposes: of all micro-batches on the slowest stage.
        tensor: collectives between tensor ranks, which nothing hides.
        pipeline: sends between stages that nothing hides.
        bubble: the slowest stage waits for the others, while the pipeline fills and drains.
        data: what is left of the data ranks' collectives after what they hide behind.
        optimizer: and, where transposes stay between steps, making them.
    """

    products: float
    attention: float
    memory: float
    transposes: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, f.name) for f in fields(self))


def step_time(
    config: Config,
    derived: Derived,
    stages: Sequence[Sequence[nn.Module]],
    shares: Sequence[ShareSize],
    cluster: Cluster,
    times: ProductTimes,
) -> StepTime:
    """Predict a step.

    Args:
        config: the run.
        derived: for as many ranks as the cluster has.
        stages: the layers of a rank of each pipeline stage; layers that are alike may be one object.
        shares: what such a rank holds.
        cluster: where it runs.
        times: of its products.
    """
    machine = Machine(times, cluster.peaks)
    resident = derived.backward_weight == "resident"
    known: dict[int, Work] = {}
    works, sent = [], []
    for stage, (layers, share) in enumerate(zip(stages, shares, strict=True)):
        first, last = stage == 0, stage == len(stages) - 1
        blocks = layers[first : len(layers) - last]
        edges = [*layers[:first], *layers[len(layers) - last :]]
        for block in blocks:
            if id(block) not in known:
                known[id(block)] = block_work(block, config, machine, resident=resident)
        work = sum((edge_work(edge, config, machine) for edge in edges), Work())
        works.append(sum((known[id(block)] for block in blocks), work))
        sent.append(messages(config, derived, stage, len(blocks), share))
    micro_batches = derived.accumulation_steps
    tensor = [_seconds(found, "tensor", config, derived, cluster) / micro_batches for found in sent]
    each = [work.seconds + spoken for work, spoken in zip(works, tensor, strict=True)]
    slowest = max(range(len(each)), key=each.__getitem__)
    hop = _seconds(sent[slowest], "pipeline", config, derived, cluster) / micro_batches
    work = works[slowest]
    return StepTime(
        products=work.products * micro_batches,
        attention=work.attention * micro_batches,
        memory=work.memory * micro_batches,
        transposes=work.transposes * micro_batches,
        tensor=tensor[slowest] * micro_batches,
        # In the steady state a stage computes while it sends; in filling and draining nothing does.
        pipeline=hop * (len(each) - 1),
        bubble=sum(each) - each[slowest],
        data=max(_data_seconds(found, each[stage], config, derived, cluster) for stage, found in enumerate(sent)),
        optimizer=max(
            optimizer_seconds(share, config, derived.data_ranks, cluster.peaks, resident=resident) for share in shares
        ),
    )


def _seconds(found: Iterable[Message], group: str, config: Config, derived: Derived, cluster: Cluster) -> float:
    wanted = [message for message in found if message.group == group]
    if not wanted:
        return 0.0
    ranks = group_of(config, derived, wanted[0].group)
    if group == "pipeline":
        # To a neighbour: on the same node only if the whole pipeline step is.
        ranks = ranks[:2]
    return sum(message.sent for message in wanted) / cluster.bandwidth(ranks)


def _data_seconds(
    found: Iterable[Message], micro_batch: float, config: Config, derived: Derived, cluster: Cluster
) -> float:
    """What the data ranks' collectives add.

    Gradients are reduced while backward, two thirds of a micro-batch, goes on, or once all are added up. Weights of
    ZeRO 3 and FSDP2 are gathered ahead, while the layers before are computed. Those of ZeRO 1 and 2 come after the
    optimizer, when nothing else does.
    """
    bandwidth = cluster.bandwidth(group_of(config, derived, "data"))
    hidden = 0.0 if _reduces_last(config) else micro_batch * 2 / 3
    added = 0.0
    for message in found:
        if message.group != "data":
            continue
        seconds = message.sent / bandwidth
        if message.what == "gradients":
            added += max(0.0, seconds - message.times * hidden)
        elif message.times > 1:
            added += max(0.0, seconds - message.times / 2 * micro_batch)
        else:
            added += seconds
    return added


def _reduces_last(config: Config) -> bool:
    """Whether gradients are reduced after the last backward: by pipelines, stage 0, and DeepSpeed's BF16_Optimizer."""
    if config.parallel.engine == "fsdp":
        return False
    return config.parallel.pipeline > 1 or zero_stage(config) == 0 or has_bf16_optimizer(config)


def optimizer_seconds(share: ShareSize, config: Config, data_ranks: int, peaks: Peaks, *, resident: bool) -> float:
    """One pass over gradient, master and moments, one more over the gradient for its norm, and the weight's copy.

    Args:
        share: what a rank holds before its data ranks divide it.
        config: the run.
        data_ranks: that divide it, if the engine does.
        peaks: of the card.
        resident: transposes stay between steps, and are made anew here.
    """
    width = WIDTH[config.precision]
    split = data_ranks if config.parallel.engine == "fsdp" or zero_stage(config) else 1
    gradient = 4 if config.parallel.gradient_dtype == "fp32" else width
    moved = share.trained / split * (2 * gradient + 2 * 4 + 2 * 8 + width)
    if resident:
        moved += 2 * (share.kept * width + share.indices)
    return moved / peaks.bandwidth
