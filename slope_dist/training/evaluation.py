"""Loss, perplexity and bits per byte of the validation split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Protocol

from torch import Tensor

from slope_dist.config import Config
from slope_dist.config.weights import shares
from slope_dist.data.corpus import IGNORED_LABEL, Corpus
from slope_dist.data.sampling import Part, evaluation_batches
from slope_dist.engine.interface import MicroBatch
from slope_dist.parallel import collectives
from slope_dist.watching.heartbeat import beat


class Evaluator(Protocol):
    """What of an engine an evaluation needs."""

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """See `Engine.evaluate`."""


@dataclass(frozen=True)
class Evaluation:
    """Result over a validation split, or over those of a mixture.

    Attributes:
        loss: nats per token.
        bytes_per_token: UTF-8 bytes of the text; None where a corpus does not say how many it stands for.
        corpora: of a mixture, the result of each corpus by name.
    """

    loss: float
    bytes_per_token: float | None
    corpora: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss), per token; a loss above 700, which would overflow, is no perplexity any more."""
        return exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of text, comparable between tokenizers."""
        return self.loss / log(2) / self.bytes_per_token if self.bytes_per_token else None

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        each = "".join(f"; {name} {result.loss:.4f}" for name, result in self.corpora.items())
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits}{each}"


def evaluate_mixture(parts: Sequence[Part], one: Callable[[Corpus], Evaluation | None]) -> Evaluation | None:
    """Evaluate each of `parts` by `one`; their means, by weight, are what a batch of the mixture has.

    Returns:
        None if one was given up.
    """
    results = {}
    for part in parts:
        result = one(part.corpus)
        if result is None:
            return None
        results[part.name] = result
    if len(results) == 1:
        return result
    weights = dict(zip(results, map(float, shares([part.weight for part in parts])), strict=True))
    sizes = {name: result.bytes_per_token for name, result in results.items() if result.bytes_per_token is not None}
    return Evaluation(
        sum(weights[name] * result.loss for name, result in results.items()),
        sum(weights[name] * size for name, size in sizes.items()) if len(sizes) == len(results) else None,
        results,
    )


def evaluate(
    engine: Evaluator,
    corpus: Corpus,
    config: Config,
    data_ranks: int,
    data_rank: int,
    *,
    samples: int | None,
    given_up: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on the first windows. Collective; every rank gets the same result.

    Args:
        engine: the model.
        corpus: the validation split.
        config: the run.
        data_ranks: ranks that share the windows.
        data_rank: this one.
        samples: windows; None: all of them.
        given_up: asked before each batch, collectively, whether to leave off.

    Returns:
        None if it was given up.
    """
    nats, tokens, text_bytes = 0.0, 0, 0
    for inputs, labels in evaluation_batches(
        corpus,
        sequence_length=config.model.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        data_ranks=data_ranks,
        data_rank=data_rank,
        samples=samples,
    ):
        if given_up():
            return None
        beat()
        loss = engine.evaluate((inputs, labels))
        counted = int((labels != IGNORED_LABEL).sum())
        if counted:
            nats += float(loss) * counted
            tokens += counted
            text_bytes += corpus.bytes_of(labels) or 0
    nats, all_tokens, all_bytes = collectives.sum_over_ranks([nats, float(tokens), float(text_bytes)])
    return Evaluation(nats / all_tokens, all_bytes / all_tokens if all_bytes else None)
