"""Claim: lm-eval-harness gets from the model "slope" what its own model class gets from transformers with the same
weights, on tasks of every kind, and its command line takes our models.

The tasks lie in tests/inference/tasks; nothing is downloaded.

Run: pytest tests/inference/test_harness.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from slope_dist.data.json_tokenizer import JsonTokenizer
from slope_dist.data.readers import Document
from slope_dist.errors import UserError
from slope_dist.inference import InferenceModel, load_model
from slope_dist.inference.evaluation import View, evaluate_documents
from slope_dist.inference.generation import Generation
from slope_dist.inference.harness import SlopeLM
from tests.data.test_json_tokenizer import byte_fallback
from tests.export.models import random_stored
from tests.inference.conftest import ROOT, TEXTS, Tool
from tests.inference.twins import merged_twin

TOOL = ROOT / "tools" / "lm_eval.py"
TASKS = ROOT / "tests" / "inference" / "tasks"
NAMES = ["slope_choice", "slope_last_word", "slope_text", "slope_answer"]


def documents() -> list[Document]:
    """Of slope_text."""
    rows = map(json.loads, (TASKS / "texts.jsonl").read_text().splitlines())
    return [Document(name=str(number), text=row["text"]) for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def slope(model: InferenceModel) -> SlopeLM:
    return SlopeLM(model, batch_size=3)


@pytest.fixture(scope="module")
def results(slope: SlopeLM, model: InferenceModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all tasks, by our model and by transformers' twin of it in the harness's own class."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(model.tokenizer.model.decode()), eos_token="<|endoftext|>"
    )
    twin = HFLM(merged_twin(model.stored, "llama"), tokenizer=tokenizer, batch_size=1, max_length=model.context)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        # The tasks name their files as from the root.
        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        for name, lm in (("ours", slope), ("theirs", twin)):
            found[name] = lm_eval.simple_evaluate(lm, tasks=NAMES, task_manager=manager, bootstrap_iters=0)
    return found


@pytest.mark.parametrize("task", NAMES)
def test_results_are_those_of_the_harnesss_own_model(results: dict[str, Any], task: str) -> None:
    ours, theirs = (results[name]["samples"][task] for name in ("ours", "theirs"))
    assert len(ours) == len(theirs) >= 3
    for one, other in zip(ours, theirs, strict=True):
        assert one["arguments"] == other["arguments"]
        for mine, its in zip(one["resps"], other["resps"], strict=True):
            (mine,), (its,) = mine, its
            if task == "slope_answer":
                assert mine == its
            elif task == "slope_text":
                assert mine == pytest.approx(its, rel=1e-5)
            else:
                assert mine[0] == pytest.approx(its[0], rel=1e-5) and mine[1] == its[1]
    numbers = [
        {key: value for key, value in results[name]["results"][task].items() if isinstance(value, float)}
        for name in ("ours", "theirs")
    ]
    assert len(numbers[0]) >= 1
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def test_bits_per_byte_are_those_of_our_own_evaluation(results: dict[str, Any], model: InferenceModel) -> None:
    assert max(len(model.tokenizer.encode(document.text)) for document in documents()) > 1.5 * model.context
    expected = evaluate_documents(model, documents(), View.of(model))
    assert results["ours"]["results"]["slope_text"]["bits_per_byte,none"] == pytest.approx(
        expected.bits_per_byte, rel=1e-5
    )


TEXT = st.text(st.sampled_from("the sparse\n of four é日"), min_size=1, max_size=20)


@settings(deadline=None, max_examples=200)
@given(context=TEXT, continuation=TEXT)
def test_a_continuation_has_all_its_tokens_and_no_more(slope: SlopeLM, context: str, continuation: str) -> None:
    pieces = slope.model.tokenizer.pieces
    before, after = slope._encode_pair(context, continuation)
    if before == [slope.eot_token_id]:
        before = []
    assert before + after == slope.tok_encode(context + continuation)
    blanks = context[len(context.rstrip()) :]
    wanted = (blanks + continuation).encode()
    spelled = b"".join(pieces[token] for token in after)
    assert spelled.endswith(wanted)
    assert len(spelled) - len(pieces[after[0]]) < len(wanted)


def test_a_token_over_the_boundary_is_the_continuations(slope: SlopeLM) -> None:
    (whole,) = slope.tok_encode(" four")
    before, after = slope._encode_pair("of fo", "ur")
    assert after == [whole]
    assert before == slope.tok_encode("of")


def asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_contexts_may_be_empty_or_too_long(slope: SlopeLM) -> None:
    model = slope.model
    end = slope.eot_token_id
    long = " of four" * 100
    requests = [asked("", "two of them"), asked("  ", "two"), asked(long, " stay")]
    (first, _), (second, _), (third, _) = slope.loglikelihood(requests, disable_tqdm=True)

    def alone(before: list[int], after: list[int]) -> float:
        ids = torch.tensor((before + after)[-(model.context + 1) :])
        logits = model.logits(ids[None, :-1])[0].double().log_softmax(dim=-1)[-len(after) :]
        return float(logits.gather(1, torch.tensor(after)[:, None]).sum())

    assert first == pytest.approx(alone([end], slope.tok_encode("two of them")), rel=1e-5)
    assert second == pytest.approx(alone([end], slope.tok_encode("  two")), rel=1e-5)
    cut = len(slope.tok_encode(long))
    assert third == pytest.approx(alone(slope.tok_encode(long), slope.tok_encode(long + " stay")[cut:]), rel=1e-5)
    with pytest.raises(UserError, match=r"the continuation ' of four of .* at most the model's context of 80"):
        slope.loglikelihood([asked("a", long)], disable_tqdm=True)


def generated(slope: SlopeLM, *requests: tuple[str, dict[str, Any]]) -> list[str]:
    return slope.generate_until([asked(*request) for request in requests], disable_tqdm=True)


def test_texts_end_before_the_first_stop_string(slope: SlopeLM) -> None:
    context = TEXTS[0]
    (whole,) = generated(slope, (context, {"max_gen_toks": 20}))
    assert len(whole) > 8
    stop, later = whole[3:6], whole[6:8]
    assert whole.index(stop) == 3
    cut = generated(
        slope,
        (context, {"max_gen_toks": 20, "until": [later, stop]}),
        (context, {"max_gen_toks": 20, "until": stop}),
        (context, {"max_gen_toks": 20, "until": ["no such text", ""]}),
    )
    assert cut == [whole[:3], whole[:3], whole]


def test_a_context_too_long_to_be_continued_keeps_its_end(slope: SlopeLM) -> None:
    long = "".join(f" four {number}" for number in range(60))
    ids = slope.tok_encode(long)
    assert len(ids) > slope.model.context
    kept = ids[-(slope.model.context - 12) :]
    generation = Generation(slope.model, [kept], max_new_tokens=12, end=slope.eot_token_id)
    expected = b"".join(slope.model.tokenizer.pieces[token] for _, token in generation if token is not None)
    assert generation.sequences[0].reason == "length"
    assert generated(slope, (long, {"max_gen_toks": 12})) == [expected.decode(errors="replace")]


def test_draws_are_made_anew_for_each_repeat_and_again_the_same(slope: SlopeLM) -> None:
    how = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    requests = [("of four", how)] * 4 + [("two", how)]
    first = generated(slope, *requests)
    assert len(set(first)) == 5
    assert generated(slope, *requests) == first
    assert generated(SlopeLM(slope.model, seed=5), *requests) != first
    greedy = generated(slope, ("of four", {"max_gen_toks": 8, "do_sample": False}), ("of four", {"max_gen_toks": 8}))
    assert greedy[0] == greedy[1]
    assert generated(slope, ("of four", how | {"temperature": 1.0, "top_k": 1}))[0] == greedy[0]


def test_what_a_task_asks_for_and_cannot_have_is_refused(slope: SlopeLM) -> None:
    with pytest.raises(UserError, match="generation settings of the task: num_beams: unknown"):
        generated(slope, ("a", {"num_beams": 4}))
    for name in ("max_gen_toks", "temperature", "top_k", "top_p"):
        with pytest.raises(UserError, match=r"generation settings of the task: .*abc"):
            generated(slope, ("a", {"max_gen_toks": 4, name: "abc"}))
    with pytest.raises(UserError, match="asks for 256 new tokens, which leaves no room in the model's context of 80"):
        generated(slope, ("a", {}))
    with pytest.raises(UserError, match="have no chat template"):
        slope.apply_chat_template([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "model_args: no path; give --model_args path=MODEL"),
        ("path=here,pretrained=gpt2", "model_args: pretrained: unknown"),
        ("path=here,batch_size=auto", "batch size auto: no size is searched for"),
        ("path=here,dtype=int8", 'there is no dtype "int8"; there are fp32, bf16, fp16'),
        ("path=here,device=tpu", 'there is no device "tpu"; there are cpu, cuda'),
        ("path=here,device=cuda:0", "device cuda:0 is not there"),
        ("path=here,device=0", 'there is no device "0"'),
        ("path=here,seed=abc", "model_args: seed abc is not a whole number"),
        ("path=here,seed=-1", "seed -1 is out of range"),
        ("path=2025", "2025 cannot be opened"),
        ("path=/nowhere", "/nowhere cannot be opened"),
    ],
)
def test_bad_model_arguments_are_refused(arguments: str, message: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        SlopeLM.create_from_arg_string(arguments)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command in this process: exit code and stderr."""
    # To list all of the harness's own tasks takes seconds.
    only_ours = partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", only_ours)
    module = Tool("lm_eval", capsys).module

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        return module.main(), capsys.readouterr().err

    return run


@pytest.mark.slow
def test_the_command_line_takes_a_run(run: Path, tmp_path: Path) -> None:
    given = ["--include_path", str(TASKS), "--tasks", "slope_text", "--output_path", str(tmp_path / "out.json")]
    # By way of a link, which Python follows before it puts the program's folder first in its path.
    (tmp_path / "tools").symlink_to(TOOL.parent)
    tool = str(tmp_path / "tools" / TOOL.name)
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, tool, "--model", "slope", "--model_args", f"path={run},batch_size=2", *given],
        # The tasks name their files as from the root.
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | offline,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "slope_text" in ended.stdout
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())["results"]["slope_text"]["bits_per_byte,none"]
    model = load_model(run)
    assert found == pytest.approx(evaluate_documents(model, documents(), View.of(model)).bits_per_byte, rel=1e-5)


def test_a_bad_path_is_one_line_on_the_command_line(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / "none"
    given = ["--include_path", str(TASKS), "--tasks", "slope_text"]
    code, errors = command("--model", "slope", "--model_args", f"path={path}", *given)
    assert code == 2
    assert errors.splitlines()[-1] == f"error: {path} cannot be opened: No such file or directory"
    assert "Traceback" not in errors


def test_without_the_harness_one_line_says_what_to_install(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "slope_dist.inference.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    code, errors = command("--help")
    assert code == 2
    assert re.fullmatch(
        r"error: lm-eval-harness is not installed \(.*\); pip install -c constraints.txt -e '.\[evaluation\]'\n", errors
    )


def test_a_space_before_texts_moves_no_boundary() -> None:
    """Of tokenizers of LLaMA's kind, which put one before every text."""
    tokenizer = JsonTokenizer(byte_fallback().to_str().encode())
    stored = random_stored("llama", vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)
    lm = SlopeLM(InferenceModel(stored))
    before, after = lm._encode_pair("of four", " stay")
    assert b"".join(tokenizer.pieces[token] for token in before) == b" of four"
    assert b"".join(tokenizer.pieces[token] for token in after) == b" stay"
