"""Perplexity and bits per byte of a text under a model.

A corpus is one stream of tokens, as training reads it. Of other text each document is a stream of its own, which begins
with the id that ends a document, as documents do in training: so all of its tokens are predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import exp, log

import numpy as np

from slope_dist.data.corpus import Corpus
from slope_dist.data.readers import Document
from slope_dist.data.sampling import num_windows
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.inference.model import InferenceModel
from slope_dist.inference.scoring import Question, score, windows
from slope_dist.transfer import Transfer


@dataclass(frozen=True)
class View:
    """How much of a text the model sees at a time.

    Attributes:
        context: most tokens that are put in.
        stride: tokens from one window to the next: each token is predicted from at least `context - stride` before
            it, where there are so many.
        batch: windows at a time.
    """

    context: int
    stride: int
    batch: int = 8

    @classmethod
    def of(
        cls, model: InferenceModel, context: int | None = None, stride: int | None = None, batch: int | None = None
    ) -> View:
        """With what is None as training has it: the model's context, and windows one behind the other.

        Raises:
            UserError: if the model has no such context, or a number makes no sense.
        """
        context = model.context if context is None else context
        stride = context if stride is None else stride
        batch = cls.batch if batch is None else batch
        if not 1 <= context <= model.context:
            raise UserError(f"context {context} is out of range; use one from 1 to the model's, {model.context}")
        if not 1 <= stride <= context:
            raise UserError(f"stride {stride} is out of range; use one from 1 to the context, {context}")
        if batch < 1:
            raise UserError(f"batch {batch} is less than 1")
        return cls(context, stride, batch)


@dataclass(frozen=True)
class Evaluation:
    """Result over a text.

    Attributes:
        loss: nats per token, the mean over all that were predicted.
        tokens: how many were.
        text_bytes: UTF-8 bytes that they spell; None where that is not known.
    """

    loss: float
    tokens: int
    text_bytes: int | None

    @property
    def perplexity(self) -> float:
        """exp(loss), per token; a loss above 700, which would overflow, is no perplexity any more."""
        return exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of text, comparable between tokenizers."""
        return self.loss * self.tokens / log(2) / self.text_bytes if self.text_bytes else None

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits}"


def evaluate_corpus(
    model: InferenceModel, corpus: Corpus, view: View, *, limit: int | None = None, transfer: Transfer | None = None
) -> Evaluation:
    """Evaluate on a split of a corpus.

    Args:
        model: to evaluate.
        corpus: whose ids are the model's: see `check_tokenizer`.
        view: how much the model sees.
        limit: predict only so many tokens, the first ones; None: as many as fill whole samples of the model, which are
            those that a run's own evaluation counts, whatever the view; of a shorter corpus, all.
        transfer: told of the tokens.

    Raises:
        UserError: the corpus has less than two tokens, or changes; the model's logits are not finite.
    """
    sample = model.stored.model.sequence_length
    wanted = (num_windows(corpus.num_tokens, sample) * sample or corpus.num_tokens - 1) if limit is None else limit
    length = 1 + min(wanted, corpus.num_tokens - 1)
    if length < 2:
        raise UserError(f"{corpus.path} has {corpus.num_tokens} tokens; at least 2 are needed to predict one")

    def questions() -> Iterator[Question]:
        for window in windows(length, view.context, view.stride):
            ids = corpus.tokens(window.start, window.stop - window.start)
            yield Question(ids, window.stop - window.predicted)

    corpus.check_unchanged()
    pieces = None if corpus.tokenizer is None else corpus.tokenizer.piece_bytes()
    transfer = transfer or Transfer()
    transfer.begin(length - 1)
    result = _mean(model, questions(), view.batch, pieces, transfer)
    corpus.check_unchanged()
    return result


def evaluate_documents(
    model: InferenceModel,
    documents: Iterable[Document],
    view: View,
    *,
    limit: int | None = None,
    transfer: Transfer | None = None,
) -> Evaluation:
    """Evaluate on texts, each by itself.

    Args:
        model: to evaluate, with a tokenizer.
        documents: the texts.
        view: how much the model sees.
        limit: predict only so many tokens, the first ones.
        transfer: told of the tokens, once begun.

    Raises:
        UserError: there is no text, or the tokenizer is not the model's; the model's logits are not finite.
    """
    tokenizer = model.tokenizer

    def questions() -> Iterator[Question]:
        left = limit
        for document in documents:
            ids = np.concatenate(([tokenizer.end_of_document], tokenizer.encode(document.text))).astype(np.int64)
            ids = ids if left is None else ids[: left + 1]
            for window in windows(len(ids), view.context, view.stride):
                yield Question(ids[window.start : window.stop], window.stop - window.predicted)
            if left is not None:
                left -= len(ids) - 1
                if left == 0:
                    return

    return _mean(model, questions(), view.batch, tokenizer.piece_bytes(), transfer or Transfer())


def check_tokenizer(tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Refuse a corpus whose ids mean other text than a model's do.

    Raises:
        UserError: the corpus has another tokenizer; one with the same pieces, as another file, is the same.
    """
    other = corpus.tokenizer
    if other is None or other.sha256 == tokenizer.sha256:
        return
    if not other.same_ids(tokenizer):
        raise UserError(
            f"{corpus.folder} was made with another tokenizer than the model's: its SHA-256 starts with "
            f"{other.sha256[:12]}, that of the model's with {tokenizer.sha256[:12]}; prepare the text with the model's"
        )


def _mean(
    model: InferenceModel,
    questions: Iterable[Question],
    batch: int,
    pieces: np.ndarray | None,
    transfer: Transfer,
) -> Evaluation:
    nats, tokens, text_bytes = 0.0, 0, 0
    for together in _batches(questions, batch):
        nats -= sum(answer.log_probability for answer in score(model, together))
        labels = np.concatenate([question.ids[-question.predicted :] for question in together])
        tokens += len(labels)
        if pieces is not None:
            # The vocabulary may be longer than the tokenizer; such ids are no text.
            text_bytes += int(pieces[labels[labels < len(pieces)]].sum())
        transfer.add(len(labels))
    if not tokens:
        raise UserError("there is no text to evaluate on; give some")
    return Evaluation(nats / tokens, tokens, None if pieces is None else text_bytes)


def _batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    together: list[Question] = []
    for question in questions:
        together.append(question)
        if len(together) == size:
            yield together
            together = []
    if together:
        yield together
