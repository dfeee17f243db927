"""Claim: each token is predicted once, from as much context as was asked for; on a run's validation split the loss is
that of the run's own evaluation; text that is not the model's is refused.

Run: pytest tests/inference/test_evaluation.py
"""

from __future__ import annotations

import os
import shutil
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from slope_dist.data.corpus import Corpus
from slope_dist.data.readers import Document
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.inference import InferenceModel, load_model
from slope_dist.inference.evaluation import Evaluation, View, check_tokenizer, evaluate_corpus, evaluate_documents
from slope_dist.inference.scoring import Question, score, windows
from slope_dist.transfer import Transfer
from tests.inference.conftest import TEXTS
from tests.runs import evaluation_rows, relative

CONTEXT = 64


@pytest.fixture(scope="module")
def trained(run: Path) -> InferenceModel:
    return load_model(run)


@pytest.fixture(scope="module")
def valid(corpus: Path, trained: InferenceModel) -> Corpus:
    return Corpus.open(corpus, "valid", trained.vocab_size)


@given(length=st.integers(0, 60), context=st.integers(1, 20), data=st.data())
def test_each_token_is_predicted_once_with_enough_before_it(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    found = list(windows(length, context, stride))
    predicted = [token for window in found for token in range(window.predicted, window.stop)]
    assert predicted == list(range(1, length))
    for window in found:
        assert 0 <= window.start < window.predicted < window.stop <= length
        # The last token of a window is predicted and not put in.
        assert window.stop - window.start - 1 <= context
        assert window.predicted - window.start >= min(window.predicted, context - stride + 1)


def by_hand(model: InferenceModel, ids: np.ndarray, context: int, stride: int) -> float:
    """Mean loss of all tokens but the first, one at a time, each from its own forward pass."""
    nats = 0.0
    for token in range(1, len(ids)):
        # The window that predicts it: the first holds `context`, each other `stride` more.
        end = context if token <= context else context + stride * -(-(token - context) // stride)
        start = max(0, min(end, len(ids) - 1) - context)
        logits = model.logits(torch.from_numpy(ids[start:token][None]))[0, -1]
        nats -= float(logits.double().log_softmax(dim=0)[ids[token]])
    return nats / (len(ids) - 1)


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (24, 24), (24, 7), (10, 1)])
def test_loss_is_that_of_single_predictions(trained: InferenceModel, valid: Corpus, context: int, stride: int) -> None:
    expected = by_hand(trained, valid.tokens(0, 101), context, stride)
    result = evaluate_corpus(trained, valid, View.of(trained, context, stride, batch=3), limit=100)
    assert result.tokens == 100
    assert relative(result.loss, expected) < 1e-5


def test_loss_is_that_of_the_run(run: Path, trained: InferenceModel, valid: Corpus) -> None:
    (row,) = evaluation_rows(run)
    result = evaluate_corpus(trained, valid, View.of(trained))
    assert result.tokens == (valid.num_tokens - 1) // CONTEXT * CONTEXT < valid.num_tokens - 1
    assert relative(result.loss, row["eval_loss"]) < 1e-5
    assert relative(result.perplexity, row["perplexity"]) < 1e-4
    assert result.bits_per_byte is not None
    assert relative(result.bits_per_byte, row["bits_per_byte"]) < 1e-5
    # More context makes it another number, over the same tokens.
    closer = evaluate_corpus(trained, valid, View.of(trained, stride=16))
    assert closer.tokens == result.tokens
    assert relative(closer.loss, result.loss) > 1e-4


def test_a_limit_counts_the_first_tokens(trained: InferenceModel, valid: Corpus) -> None:
    two = evaluate_corpus(trained, valid, View.of(trained), limit=2 * CONTEXT)
    ids = torch.from_numpy(valid.tokens(0, 2 * CONTEXT + 1))
    logits = trained.logits(ids[:-1].view(2, CONTEXT))
    assert two.loss == pytest.approx(float(functional.cross_entropy(logits.flatten(0, 1), ids[1:])), rel=1e-5)
    assert valid.tokenizer is not None
    assert two.text_bytes == valid.tokenizer.piece_bytes()[ids[1:].numpy()].sum()
    whole = evaluate_corpus(trained, valid, View.of(trained), limit=10**9)
    assert whole.tokens == valid.num_tokens - 1


def test_a_corpus_that_changes_meanwhile_is_refused(trained: InferenceModel, corpus: Path, tmp_path: Path) -> None:
    changing = Corpus.open(shutil.copytree(corpus, tmp_path / "corpus"), "valid", trained.vocab_size)
    touch = Transfer("tokens", lambda line: os.utime(changing.path, (1, 1)), quiet=0.0)
    with pytest.raises(UserError, match="was changed"):
        evaluate_corpus(trained, changing, View.of(trained), limit=CONTEXT, transfer=touch)


def test_documents_are_predicted_from_their_first_token(model: InferenceModel) -> None:
    texts = [TEXTS[0] * 3, "", TEXTS[1]]
    documents = [Document(name=str(number), text=text) for number, text in enumerate(texts)]
    result = evaluate_documents(model, documents, View.of(model, 40, 30, batch=2))
    nats, tokens = 0.0, 0
    for text in filter(None, texts):
        ids = np.array([model.tokenizer.end_of_document, *model.tokenizer.encode(text)])
        nats += by_hand(model, ids, 40, 30) * (len(ids) - 1)
        tokens += len(ids) - 1
    assert result.tokens == tokens
    assert relative(result.loss, nats / tokens) < 1e-5
    # Every byte of the texts is predicted.
    assert result.text_bytes == sum(len(text.encode()) for text in texts)
    first = evaluate_documents(model, documents, View.of(model), limit=25)
    assert first.tokens == 25
    with pytest.raises(UserError, match="there is no text"):
        evaluate_documents(model, documents[1:2], View.of(model))


def test_perplexity_and_bits_per_byte_follow_from_the_loss() -> None:
    result = Evaluation(2.0, 30, 60)
    assert result.perplexity == exp(2.0)
    assert result.bits_per_byte == pytest.approx(2.0 / log(2) / 2)
    assert str(result) == "loss 2.0000, perplexity 7.39, 1.4427 bits per byte"
    assert str(Evaluation(2.0, 30, None)) == "loss 2.0000, perplexity 7.39"


def test_questions_of_any_lengths_are_answered_as_alone(model: InferenceModel) -> None:
    draw = torch.Generator().manual_seed(1)
    questions = []
    for length, predicted in [(2, 1), (60, 3), (30, 29), (81, 80), (7, 2)]:
        ids = torch.randint(model.vocab_size, (length,), generator=draw)
        # Of the last one, let the model be right.
        if length == 7:
            ids = ids[:5]
            for _ in range(2):
                ids = torch.cat((ids, model.logits(ids[None])[0, -1].argmax().view(1)))
        questions.append(Question(ids.numpy(), predicted))
    together = score(model, questions)
    for question, answer in zip(questions, together, strict=True):
        ids = torch.from_numpy(question.ids)
        logits = model.logits(ids[None, :-1])[0, -question.predicted :].double().log_softmax(dim=-1)
        labels = ids[-question.predicted :]
        assert answer.log_probability == pytest.approx(float(logits.gather(1, labels[:, None]).sum()), rel=1e-5)
        assert answer.greedy == bool((logits.argmax(dim=-1) == labels).all())
    assert [answer.greedy for answer in together] == [False] * 4 + [True]


def test_ids_that_are_not_the_models_are_refused(model: InferenceModel) -> None:
    with pytest.raises(UserError, match=f"the text has the id {model.vocab_size}, which is not of the model's"):
        score(model, [Question(np.array([1, model.vocab_size]), 1)])


def test_logits_that_are_not_finite_are_refused(model: InferenceModel) -> None:
    half = InferenceModel(model.stored)
    with torch.no_grad():
        half.module.layers[-1].norm.weight[0] = torch.inf
    with pytest.raises(UserError, match=r"not finite in torch.float32; use another dtype"):
        score(half, [Question(np.array([1, 2]), 1)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 81}, "context 81 is out of range; use one from 1 to the model's, 80"),
        ({"context": 0}, "context 0 is out of range"),
        ({"context": 20, "stride": 21}, "stride 21 is out of range; use one from 1 to the context, 20"),
        ({"stride": 0}, "stride 0 is out of range"),
        ({"batch": 0}, "batch 0 is less than 1"),
    ],
)
def test_a_view_that_the_model_cannot_have_is_refused(
    model: InferenceModel, values: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        View.of(model, **values)


def test_a_corpus_of_another_tokenizer_is_refused(
    corpus: Path, trained: InferenceModel, valid: Corpus, tokenizer: Tokenizer
) -> None:
    check_tokenizer(trained.tokenizer, valid)
    with pytest.raises(UserError, match=r"made with another tokenizer than the model's: its SHA-256 starts with"):
        check_tokenizer(tokenizer, valid)


def test_progress_is_told_in_tokens(trained: InferenceModel, valid: Corpus) -> None:
    said: list[str] = []
    transfer = Transfer("tokens", said.append, quiet=0.0)
    evaluate_corpus(trained, valid, View.of(trained, batch=1), limit=3 * CONTEXT, transfer=transfer)
    assert len(said) == 3
    assert said[1].startswith("tokens: 128 B of 192 B")
