"""A checkpoint reads as the model that was trained: names, numbers, dtype, adapters, tokenizer; or a line says why not.

Run: pytest tests/export/test_checkpoint_model.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from slope_dist.checkpoint import Checkpoint, CheckpointError
from slope_dist.config import load_config
from slope_dist.data.corpus import Corpus
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.sampling import evaluation_batches
from slope_dist.errors import UserError
from slope_dist.export.checkpoint_model import CheckpointModel
from slope_dist.export.opening import form_of, open_model
from slope_dist.inference import InferenceModel
from slope_dist.transfer import Transfer
from tests.checkpoint.rewriting import rewrite
from tests.distributed import run_ranks
from tests.runs import (
    FIRST_ADAPTER_STEP,
    STEPS,
    evaluation_rows,
    make_corpus,
    read_all,
    small_corpus,
    train,
    write_config,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fp32 run in `fp32/run`, a bf16 one in `bf16/run`, both with the checkpoint of every step."""
    base = tmp_path_factory.mktemp("runs")
    corpus = small_corpus(base)
    for precision in ("fp32", "bf16"):
        config = write_config(
            base / precision, corpus, precision=precision, checkpoint__interval=1, checkpoint__keep=STEPS
        )
        run_ranks(train, 1, str(config))
    return base


def checkpoint(base: Path, step: int, precision: str = "fp32") -> Path:
    return base / precision / "run" / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [FIRST_ADAPTER_STEP - 1, STEPS])
def test_it_reads_the_run_s_own_weights(base: Path, step: int, precision: str) -> None:
    path = checkpoint(base, step, precision)
    model = CheckpointModel(path)
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert model.model == load_config(base / precision / "config.json").model
    assert model.has_adapters == (step >= FIRST_ADAPTER_STEP)
    assert model.origin.step == step
    stored = Checkpoint.open(path)
    weights, metadata = read_all(stored, "weight"), read_all(stored, "metadata")
    assert model.shapes.keys() == weights.keys() | metadata.keys()
    for name, tensor in (weights | metadata).items():
        assert torch.equal(model.read(name), tensor)
        assert torch.equal(model.read(name, 1, 2), tensor[1:2])
    assert model.linears["decoder.layers.0.self_attn.q_proj"].pattern is None
    assert str(model.linears["decoder.layers.0.fc1"].pattern) == "2:4"


def test_a_run_folder_is_its_newest_checkpoint(base: Path) -> None:
    for path in (base / "fp32" / "run", base / "fp32" / "run" / "checkpoints"):
        assert form_of(path) == "checkpoint"
        assert open_model(path).origin.path.name == f"step-{STEPS:08d}"


@pytest.mark.parametrize("place", [".", "checkpoints", f"checkpoints/step-{STEPS:08d}"])
def test_every_file_is_hashed_once_and_that_is_reported(base: Path, place: str) -> None:
    class Counted(Transfer):
        bytes = 0

        def add(self, size: int) -> None:
            super().add(size)
            self.bytes += size

    counted = Counted()
    open_model(base / "fp32" / "run" / place, transfer=counted)
    files = checkpoint(base, STEPS).glob("*.safetensors")
    assert counted.bytes == sum(path.stat().st_size for path in files)


def test_its_loss_is_that_of_the_run(base: Path) -> None:
    model = InferenceModel(open_model(base / "fp32" / "run"))
    corpus = Corpus.open(small_corpus(base), "valid", model.vocab_size)
    nats, count = 0.0, 0
    for tokens, labels in evaluation_batches(
        corpus, sequence_length=model.context, micro_batch_size=2, data_ranks=1, data_rank=0, samples=6
    ):
        logits = model.logits(tokens).flatten(0, 1)
        nats += float(functional.cross_entropy(logits, labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    assert nats / count == pytest.approx(evaluation_rows(base / "fp32" / "run")[-1]["eval_loss"], rel=1e-6)


def test_the_tokenizer_is_the_corpus_s_and_no_other(base: Path, tmp_path: Path) -> None:
    path = checkpoint(base, STEPS)
    corpus = small_corpus(base)
    assert CheckpointModel(path).tokenizer() is load_tokenizer(corpus)
    assert CheckpointModel(path, corpus / "tokenizer.model").tokenizer() is load_tokenizer(corpus)
    with pytest.raises(UserError, match=r"is not at .*missing; name it with --tokenizer PATH"):
        CheckpointModel(path, tmp_path / "missing").tokenizer()
    other = tmp_path / "other"
    run_ranks(make_corpus, 1, str(other), 4)
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was trained with"):
        CheckpointModel(path, other).tokenizer()
    with pytest.raises(UserError, match=r"is not at .*; name it with --tokenizer PATH"):
        CheckpointModel(path, tmp_path / ("long" * 100)).tokenizer()


def test_nor_is_one_that_ends_a_document_with_another_id(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is told by a file beside the tokenizer's, of which its hash knows nothing."""
    model = CheckpointModel(checkpoint(base, STEPS))
    end = load_tokenizer(small_corpus(base)).end_of_document
    assert model._checkpoint.identity["end_of_document"] == end
    monkeypatch.setattr(model.tokenizer(), "end_of_document", end + 1)
    with pytest.raises(UserError, match=rf"ends a document with id {end + 1}, and .* was trained with id {end};"):
        model.tokenizer()
    # Of what was written before it was kept, nothing is known.
    monkeypatch.delitem(model._checkpoint.identity, "end_of_document")
    model.tokenizer()


@pytest.mark.parametrize("form", ["folder", "pair of files", "mixture"])
def test_a_corpus_without_tokenizer_hides_no_other(base: Path, tmp_path: Path, form: str) -> None:
    corpus, bare = small_corpus(base), tmp_path / "a-bare-one"
    bare.mkdir()
    for file in (*corpus.glob("*.bin"), *corpus.glob("*.idx")):
        shutil.copy(file, bare)
    tokenizer = tmp_path / "elsewhere.model"
    shutil.copy(corpus / "tokenizer.model", tokenizer)
    data: dict[str, Any] = {
        "folder": {"folder": str(bare), "tokenizer": str(tokenizer)},
        "pair of files": {"folder": str(bare / "train"), "tokenizer": str(tokenizer)},
        "mixture": {"mixture": [f"{bare}=1", f"{corpus}=1"]},
    }[form]

    def read(tensors: dict[str, Any], content: dict[str, Any]) -> None:
        content["config"]["data"] = data

    path = rewrite(checkpoint(base, STEPS), tmp_path, read)
    assert CheckpointModel(path).tokenizer().sha256 == load_tokenizer(corpus).sha256
    tokenizer.unlink()
    if form != "mixture":
        with pytest.raises(UserError, match=r"is not at .*elsewhere\.model; name it with --tokenizer PATH"):
            CheckpointModel(path).tokenizer()


def test_no_tokenizer_at_all_is_one_line(base: Path, tmp_path: Path) -> None:
    def read(tensors: dict[str, Any], content: dict[str, Any]) -> None:
        content["config"]["data"] = {"folder": str(tmp_path)}

    path = rewrite(checkpoint(base, STEPS), tmp_path, read)
    with pytest.raises(UserError, match=rf"is not at {tmp_path}; name it with --tokenizer PATH"):
        CheckpointModel(path).tokenizer()


def test_what_is_no_model_is_refused_in_a_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no model: expected a checkpoint"):
        open_model(tmp_path / "empty")
    with pytest.raises(UserError, match="nothing cannot be opened: No such file"):
        open_model(tmp_path / "nothing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is no checkpoint, and holds none"):
        open_model(tmp_path / "run")
    unfinished = tmp_path / f"step-00000010.tmp-{'0' * 32}"
    shutil.copytree(checkpoint(base, STEPS), unfinished)
    with pytest.raises(UserError, match="is a checkpoint whose save did not end"):
        open_model(unfinished)
    (unfinished / "manifest.json").unlink()
    with pytest.raises(UserError, match="is a checkpoint whose save did not end"):
        open_model(unfinished)


def test_a_flipped_bit_is_named(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000010"
    shutil.copytree(checkpoint(base, STEPS), path)
    file = next(path.glob("*.weights.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file.name}: expected sha256"):
        open_model(path)


def other_size(tensors: dict[str, Any], content: dict[str, Any]) -> None:
    content["config"]["model"]["ffn_size"] = 128


def no_model(tensors: dict[str, Any], content: dict[str, Any]) -> None:
    del content["config"]["model"]


def dense(tensors: dict[str, Any], content: dict[str, Any]) -> None:
    content["config"]["sparsity"]["dense_layers"] = ["*.fc1"]


def lost(tensors: dict[str, Any], content: dict[str, Any]) -> None:
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        del tensors[f"{kind}/decoder.layers.1.fc2.bias"]


def mixed(tensors: dict[str, Any], content: dict[str, Any]) -> None:
    tensors["weight/decoder.layers.1.fc2.bias"] = tensors["weight/decoder.layers.1.fc2.bias"].half()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_size, r"fc1\.weight\.values: expected a tensor of shape \[128, 16\], found F32 \[64, 16\]"),
        (no_model, r"config: .*model"),
        (dense, r"fc1\.weight\.values: expected a tensor of shape \[64, 32\], found F32 \[64, 16\]"),
        (lost, r"layers\.1\.fc2\.bias: expected a tensor of shape \[32\], found none"),
        (mixed, r"expected weights of one dtype"),
    ],
)
def test_tensors_that_are_not_the_config_s_are_refused(base: Path, tmp_path: Path, change: Any, expected: str) -> None:
    path = rewrite(checkpoint(base, STEPS), tmp_path, change)
    with pytest.raises(CheckpointError, match=expected):
        open_model(path)


def test_bad_numbers_and_metadata_are_refused_when_they_are_read(base: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any], content: dict[str, Any]) -> None:
        tensors["weight/decoder.layers.1.fc2.bias"][3] = torch.nan
        tensors["metadata/decoder.layers.1.fc2.weight.indices"][5, 2] = 0

    model = open_model(rewrite(checkpoint(base, STEPS), tmp_path, spoil))
    with pytest.raises(CheckpointError, match=r"fc2\.bias: expected finite numbers"):
        model.read("decoder.layers.1.fc2.bias")
    with pytest.raises(CheckpointError, match=r"fc2\.weight\.indices: row 5 of the metadata is not a valid 2:4"):
        model.dense("decoder.layers.1.fc2")
