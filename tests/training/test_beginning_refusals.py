"""Claim: what cannot be the beginning of a run is refused in one line, and what fails or is interrupted leaves nothing.

Run: pytest tests/training/test_beginning_refusals.py
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slope_dist.config import Config
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export import open_model
from slope_dist.export.stored import StoredModel
from slope_dist.training import ending
from slope_dist.training.beginning import begin_from
from slope_dist.training.ending import Turn
from slope_dist.transfer import Transfer
from tests.checkpoint.states import in_child
from tests.distributed import run_ranks
from tests.programs import program
from tests.runs import make_corpus
from tests.training.beginnings import Altered, begun, config_for, model_of, written


def make_other_corpus(folder: str) -> None:
    make_corpus(folder, seed=5)


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other text, and so with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other") / "corpus"
    run_ranks(make_other_corpus, 1, str(folder))
    return folder


def test_the_ids_must_be_those_of_the_model(
    corpus: Path, other_corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("opt", tokenizer)
    with pytest.raises(
        UserError, match=r"the tokenizer of memory is not that of .*prepare the corpus with the model's"
    ):
        begin_from(stored, config_for(stored, tmp_path, other_corpus))
    assert not (tmp_path / "run").exists()
    without = model_of("opt", None)
    lines = begin_from(without, config_for(without, tmp_path, corpus)).lines
    assert any(line.startswith(f"nothing shows that the ids of {corpus} are those") for line in lines)


def test_the_same_ids_out_of_another_file_will_do(
    corpus: Path, other_corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("opt", tokenizer)
    written(stored, "hf", tmp_path / "made")
    given = open_model(tmp_path / "made", tmp_path / "made" / "tokenizer.json")
    assert given.tokenizer().sha256 != tokenizer.sha256
    lines = begin_from(given, config_for(stored, tmp_path, corpus)).lines
    assert not any("ids" in line for line in lines)
    with pytest.raises(UserError, match=r"the tokenizer of .*made is not that of "):
        begin_from(given, config_for(stored, tmp_path / "other", other_corpus))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model": {"family": "gpt2", "embedding_size": None}},
            'memory has model.family "opt", and the config "gpt2"; set it to "opt", or choose another model',
        ),
        ({"model": {"ffn_size": 168}}, "memory has model.ffn_size 160, and the config 168; set it to 160, "),
        ({"model": {"num_heads": 8}}, "memory has model.num_heads 4, and the config 8; set it to 4, "),
        ({"model": {"vocab_size": 520}}, "memory has model.vocab_size 512, and the config 520; set it to 512, "),
        # Learned positions would be cut.
        ({"model": {"sequence_length": 16}}, "memory has model.sequence_length 80, and the config 16; set it to 80, "),
        ({"model": {"norm_epsilon": 1e-6}}, "memory has model.norm_epsilon 1e-05, and the config 1e-06; "),
        ({"data": {"folder": "nowhere"}}, r"no corpus in nowhere \(data.folder\); make one with tools/prepare_data.py"),
        ({"sparsity": {"dense_layers": ["*.fc3"]}}, r'sparsity.dense_layers: "\*.fc3" matches no linear of this model'),
    ],
)
def test_what_is_not_the_configs_model_is_refused(
    changes: dict[str, Any], match: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("opt", tokenizer)
    with pytest.raises(UserError, match=match) as caught:
        begin_from(stored, config_for(stored, tmp_path, corpus, **changes))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_longer_samples_than_the_models_are_refused(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("llama", tokenizer)
    with pytest.raises(UserError, match=r"model.sequence_length 80, and the config 96; set it to at most 80"):
        begin_from(stored, config_for(stored, tmp_path, corpus, model={"sequence_length": 96}))


@pytest.mark.parametrize(
    ("name", "value", "precision", "match"),
    [
        ("decoder.layers.2.fc1.weight.values", 7e4, "fp16", "fc1.weight.values holds 70000, which is beyond the range"),
        ("decoder.layers.2.fc2.bias", 1e5, "fp16", "fc2.bias holds 100000, which is beyond the range of fp16; use "),
        ("decoder.embed_tokens.weight", 1e38, "fp32", "its loss in fp32 is not finite, so no run could go on from it"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(
    name: str, value: float, precision: str, match: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("opt", tokenizer)
    bad = stored.read(name)
    bad.view(-1)[: 1 if value != 1e38 else None] = value
    with pytest.raises(UserError, match=match):
        begin_from(Altered(stored, name, bad), config_for(stored, tmp_path, corpus, precision=precision))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_damaged_file_leaves_nothing(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("opt", tokenizer)
    written(stored, "hf", tmp_path / "made")
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    tensors["model.decoder.layers.2.fc1.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "made" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.2.fc1.weight: expected finite numbers, found NaN or infinity"):
        begin_from(open_model(tmp_path / "made"), config_for(stored, tmp_path, corpus))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "made"]


def test_the_command_says_so_and_ends_with_2(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = model_of("llama", tokenizer, adapters=True, rank=16)
    written(stored, "hf", tmp_path / "made")
    config_for(stored, tmp_path, corpus)
    arguments = [str(tmp_path / "made"), "--to", "slope-checkpoint", "--config", str(tmp_path / "config.json")]
    capsys.readouterr()
    main = program("convert_checkpoint").main
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"error: {tmp_path}/made has adapters, and ")
    assert main([*arguments, "--merge-adapters", "--set", "model.ffn_size=168"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/made has model.ffn_size 160, and the config 168; ")
    named = str(tmp_path / "nothing")
    assert main([*arguments, "--merge-adapters", "--tokenizer", named]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot read tokenizer {named[:60]}")
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--merge-adapters"]) == 0
    assert f"{tmp_path}/run/checkpoints/step-00000000: " in capsys.readouterr().out


def test_a_folder_with_checkpoints_is_refused(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("opt", tokenizer)
    config = config_for(stored, tmp_path, corpus)
    begin_from(stored, config)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"run/checkpoints already holds checkpoints; choose another run.folder"):
        begin_from(stored, config)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def test_a_full_disk_leaves_nothing(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = model_of("opt", tokenizer)
    whole = begin_from(stored, config_for(stored, tmp_path / "whole", corpus)).path
    config = config_for(stored, tmp_path / "a" / "b", corpus)

    def body(limit: int, match: str) -> None:
        """A size limit stands for a full disk: it is met by the scratch file, or by a file of the checkpoint."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(UserError, match=match):
            begin_from(stored, config)

    # The scratch file is of about the size of the weights; the moments are twice that.
    size = (whole / "rank-00000.weights.safetensors").stat().st_size
    assert in_child(lambda: body(size // 2, "b/run was not written: .*File too large")) == 0
    assert in_child(lambda: body(size * 3 // 2, "step 0 was not saved: .*optimizer.*: File too large")) == 0
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match=r"b/run has 0.00 GB free, and 0.00 GB are needed; make room"):
        begin_from(stored, config)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_a_folder_in_use_is_refused(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = model_of("opt", tokenizer)
    config = config_for(stored, tmp_path, corpus)
    saving = tmp_path / "run" / "checkpoints" / f"step-00000004.tmp-{'1' * 32}"
    saving.mkdir(parents=True)
    monkeypatch.setattr(ending, "PATIENCE", 0.0)
    holder = Turn(tmp_path / "run")
    holder.take()
    with pytest.raises(UserError, match=r"run is in use by another process"):
        begin_from(stored, config)
    assert saving.exists()
    holder.release()
    begin_from(stored, config)
    begun(tmp_path)


class Interrupting(Transfer):
    """Sends this process a signal after so many reports."""

    def __init__(self, reports: int, sent: signal.Signals) -> None:
        super().__init__()
        self.left, self.sent = reports, sent

    def add(self, size: int) -> None:
        super().add(size)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.sent)


def reports_of(stored: StoredModel, config: Config) -> int:
    counting = Interrupting(-1, signal.SIGINT)
    begin_from(stored, config, transfer=counting)
    return -1 - counting.left


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_one_leaves_no_checkpoint(
    sent: signal.Signals, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("opt", tokenizer)
    total = reports_of(stored, config_for(stored, tmp_path / "whole", corpus))
    config = config_for(stored, tmp_path, corpus)

    def body(reports: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            begin_from(stored, config, transfer=Interrupting(reports, sent))

    for reports in (1, total // 2, total - 2):
        assert in_child(lambda reports=reports: body(reports)) == (0 if sent == signal.SIGINT else -signal.SIGKILL)
        if sent == signal.SIGINT:
            assert not (tmp_path / "run").exists()
        else:
            assert not list((tmp_path / "run" / "checkpoints").glob("step-00000000"))
    # What a kill leaves is no obstacle.
    begin_from(stored, config)
    begun(tmp_path)
