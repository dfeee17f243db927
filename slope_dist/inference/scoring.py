"""How probable a model finds tokens that are given.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slope_dist.errors import UserError
from slope_dist.inference.model import InferenceModel


class Question(NamedTuple):
    """Tokens of which the last ones are to be predicted, each from all before it.

    Attributes:
        ids: int64 [S + 1], of which S are put in.
        predicted: how many of the last, from 1 to S.
    """

    ids: np.ndarray
    predicted: int


class Score(NamedTuple):
    """What the model says to a question.

    Attributes:
        log_probability: of the predicted tokens together, in nats.
        greedy: whether each of them is the most probable in its place.
    """

    log_probability: float
    greedy: bool


class Window(NamedTuple):
    """A part of a stream of tokens: [start, stop), of which those from `predicted` on are predicted."""

    start: int
    stop: int
    predicted: int


def windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Windows in which every token of a stream but its first is predicted once.

    Each is predicted from at least `context - stride` tokens before it, or all; the last window, where fewer than
    `stride` tokens are left, from more.

    Args:
        length: tokens of the stream.
        context: most tokens that are put in.
        stride: from 1 to `context`.
    """
    predicted = 1
    while predicted < length:
        stop = min(predicted + (context if predicted == 1 else stride), length)
        yield Window(max(0, stop - 1 - context), stop, predicted)
        predicted = stop


@torch.inference_mode()
def score(model: InferenceModel, questions: Sequence[Question]) -> list[Score]:
    """Answers to a batch of questions, computed in fp32 from the model's logits.

    Raises:
        UserError: an id is not of the model's vocabulary, or the logits are not finite.
    """
    width = max(len(question.ids) for question in questions) - 1
    # Shorter ones are padded behind, where no token of theirs looks.
    tokens = torch.zeros(len(questions), width, dtype=torch.int64)
    for row, question in enumerate(questions):
        ids = torch.as_tensor(question.ids)
        bad = ids[(ids < 0) | (ids >= model.vocab_size)]
        if len(bad):
            raise UserError(
                f"the text has the id {int(bad[0])}, which is not of the model's {model.vocab_size}; is the tokenizer "
                "the model's?"
            )
        tokens[row, : len(ids) - 1] = ids[:-1]
    since = min(len(question.ids) - 1 - question.predicted for question in questions)
    logits = model.logits(tokens, since=since)
    return [_score(logits[row], question, since) for row, question in enumerate(questions)]


def _score(logits: Tensor, question: Question, since: int) -> Score:
    """[S, V] from place `since` on."""
    stop = len(question.ids) - 1 - since
    # One question at a time: in fp32 the logits of a batch may be the largest tensor there is.
    own = logits[stop - question.predicted : stop].float()
    labels = torch.as_tensor(question.ids[-question.predicted :]).to(own.device)
    nats = functional.cross_entropy(own, labels, reduction="none")
    if not nats.isfinite().all():
        raise UserError(f"the model's logits are not finite in {logits.dtype}; use another dtype, such as fp32")
    return Score(-float(nats.double().sum()), bool((own.argmax(dim=-1) == labels).all()))
