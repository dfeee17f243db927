"""Loss, perplexity and bits per byte of the validation split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

from slope_dist.config import Config
from slope_dist.data.corpus import Corpus
from slope_dist.data.sampling import IGNORED_LABEL, evaluation_batches
from slope_dist.engine import Engine
from slope_dist.parallel import collectives


@dataclass(frozen=True)
class Evaluation:
    """Result over the validation split.

    Attributes:
        loss: nats per token.
        perplexity: exp(loss), per token.
        bits_per_byte: bits per UTF-8 byte of text, comparable between tokenizers; None where the corpus does not say
            how many bytes it stands for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None


def evaluate(
    engine: Engine,
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
        loss = engine.evaluate((inputs, labels))
        counted = int((labels != IGNORED_LABEL).sum())
        if counted:
            nats += float(loss) * counted
            tokens += counted
            text_bytes += corpus.bytes_of(labels) or 0
    nats, all_tokens, all_bytes = collectives.sum_over_ranks([nats, float(tokens), float(text_bytes)])
    mean = nats / all_tokens
    # exp overflows above 709; a loss that large is no perplexity any more.
    return Evaluation(mean, exp(min(mean, 700.0)), nats / log(2) / all_bytes if all_bytes else None)
