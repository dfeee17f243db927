"""Claim: a model at rest becomes step 0 of a run: zeros that satisfy the pattern are kept to the bit, other weights are
pruned by magnitude, masters are the source's own numbers; and what cannot be a beginning is refused with nothing left.

Run: pytest tests/training/test_beginning.py
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
from torch import Tensor

from slope_dist.checkpoint.validation import check_state
from slope_dist.config import Config, derive, load_config
from slope_dist.data.load_tokenizer import load_tokenizer
from slope_dist.data.tokenizer import Tokenizer
from slope_dist.errors import UserError
from slope_dist.export import open_model
from slope_dist.export.checkpoint_model import CheckpointModel
from slope_dist.export.exporting import convert
from slope_dist.export.options import Options
from slope_dist.export.stored import LinearForm, StoredModel, forms_of
from slope_dist.sparse import CompressedMatrix, Pattern, codec, pruning
from slope_dist.training.beginning import begin_from
from slope_dist.training.build import build, layer_factory
from slope_dist.training.first_state import prune
from slope_dist.transfer import Transfer
from tests.checkpoint.states import in_child
from tests.distributed import run_ranks
from tests.export.models import MemoryModel, random_stored
from tests.models.twins import FORMS
from tests.runs import VOCAB_SIZE, make_corpus, newest, read_all, same_bits, write_config


class AsDense(StoredModel):
    """The same model whose files know nothing of patterns."""

    def __init__(self, sparse: StoredModel) -> None:
        self.sparse = sparse
        self.origin, self.model, self.dtype = sparse.origin, sparse.model, sparse.dtype
        self.linears = {name: LinearForm(form.shape, bias=form.bias) for name, form in sparse.linears.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        linear = name.removesuffix(".weight.values")
        found = self.sparse.dense(linear) if linear in self.linears else self.sparse.read(name)
        return found[start:stop].clone()

    def tokenizer(self) -> Tokenizer:
        return self.sparse.tokenizer()


class Altered(StoredModel):
    """A model of which one tensor is another."""

    def __init__(self, model: StoredModel, name: str, tensor: Tensor) -> None:
        self.whole, self.name, self.tensor = model, name, tensor
        self.origin, self.model, self.dtype, self.linears = model.origin, model.model, model.dtype, model.linears

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensor[start:stop].clone() if name == self.name else self.whole.read(name, start, stop)

    def tokenizer(self) -> Tokenizer:
        return self.whole.tokenizer()


FORMS_OF_FILES = ("hf", "compressed", "slope")

SECOND = {
    "opt": "decoder.layers.1.fc1",
    "gpt2": "transformer.h.1.mlp.c_fc",
    "llama": "model.layers.1.mlp.up_proj",
    "mistral": "model.layers.1.mlp.up_proj",
}


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus)


def model_of(form: str, tokenizer: Tokenizer | None, **how: Any) -> MemoryModel:
    return random_stored(form, vocab_size=VOCAB_SIZE, tokenizer=tokenizer, **how)


def config_for(stored: StoredModel, folder: Path, corpus: Path, **changes: Any) -> Config:
    model = stored.model.model_dump(mode="json") | changes.pop("model", {})
    return load_config(write_config(folder, corpus, model=model, **changes))


def written(stored: StoredModel, form: str, target: Path, **how: bool) -> None:
    convert(stored, form, target, Options(**how), Transfer(), Transfer())


def begun(folder: Path) -> CheckpointModel:
    """The checkpoint of step 0, all of it checked."""
    checkpoint = newest(folder / "run")
    assert checkpoint.step == 0
    check_state(checkpoint)
    return CheckpointModel(folder / "run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_sparse_model_comes_back_to_the_bit(
    form: str, dtype: torch.dtype, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sparse = model_of(form, tokenizer, dtype=dtype)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    # A kept -0.0 behind pruned entries, and groups that keep less than they may.
    odd = sparse.dense(SECOND[sparse.model.family]).clone()
    odd[2, :8] = torch.tensor([0.0, -0.0, 3.0, 0.0, 0.0, 0.0, 0.0, -0.0])
    source = Altered(AsDense(sparse), f"{SECOND[sparse.model.family]}.weight.values", odd)
    lines = begin_from(source, config_for(sparse, tmp_path, corpus, precision=precision)).lines
    count = sum(form.pattern is not None for form in sparse.linears.values())
    assert f"{count} of {count} sparse layers satisfied their pattern and were kept exactly" in lines
    back = begun(tmp_path)
    assert back.dtype == dtype and back.shapes == sparse.shapes
    assert odd.signbit().any() and odd[2, :4].count_nonzero() == 1
    for name in sparse.linears:
        assert same_bits(back.dense(name), source.dense(name)), name
    for name in sparse.skeleton.others:
        assert same_bits(back.read(name), sparse.read(name)), name


@pytest.mark.parametrize("form", FORMS_OF_FILES)
def test_every_form_of_files_comes_back_to_the_bit(
    form: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("gpt2", tokenizer, dtype=torch.bfloat16)
    written(stored, form, tmp_path / "made")
    begin_from(open_model(tmp_path / "made"), config_for(stored, tmp_path, corpus, precision="bf16"))
    written(stored, "hf", tmp_path / "before")
    written(begun(tmp_path), "hf", tmp_path / "after")
    names = [path.name for path in (tmp_path / "before").iterdir()]
    assert "model.safetensors" in names and "tokenizer.model" in names
    for name in names:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name


@pytest.mark.parametrize(("form", "how"), [("hf", {}), ("compressed", {}), ("slope", {"prune_adapters": True})])
def test_adapters_of_every_form_of_files_can_be_merged(
    form: str, how: dict[str, bool], corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stored = model_of("llama", tokenizer, adapters=True, rank=16)
    written(stored, form, tmp_path / "made", **how)
    made = open_model(tmp_path / "made")
    assert made.has_adapters and any(form.appended for form in made.linears.values()) == bool(how)
    begin_from(made, config_for(stored, tmp_path, corpus), merge_adapters=True)
    back = begun(tmp_path)
    for name, form_of_layer in back.linears.items():
        merged = made.merged(name)
        assert torch.equal(back.dense(name), best_two(merged) if form_of_layer.pattern else merged), name


def test_a_damaged_file_leaves_nothing(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("opt", tokenizer)
    written(stored, "hf", tmp_path / "made")
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    tensors["model.decoder.layers.2.fc1.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "made" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.2.fc1.weight: expected finite numbers, found NaN or infinity"):
        begin_from(open_model(tmp_path / "made"), config_for(stored, tmp_path, corpus))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "made"]


def test_a_sparse_source_keeps_its_values_and_indices(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sparse = model_of("opt", tokenizer)
    begin_from(sparse, config_for(sparse, tmp_path, corpus))
    back = begun(tmp_path)
    for name in sparse.shapes:
        assert same_bits(back.read(name), sparse.read(name)), name


def best_two(dense: Tensor) -> Tensor:
    """2:4 by sorting, the first of equals first."""
    groups = dense.double().abs().view(dense.shape[0], -1, 4)
    order = groups.sort(dim=2, descending=True, stable=True).indices[:, :, :2]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
    return dense * kept.view(dense.shape)


def test_a_dense_model_is_pruned_by_magnitude(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    dense = model_of("opt", tokenizer, pattern=None)
    weight = dense.dense("decoder.layers.1.fc1").clone()
    weight[3, :8] = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.5, -2.0, 0.5, 0.5])
    lines = begin_from(
        Altered(dense, "decoder.layers.1.fc1.weight.values", weight), config_for(dense, tmp_path, corpus)
    ).lines
    back = begun(tmp_path)
    assert back.dense("decoder.layers.1.fc1")[3, :8].tolist() == [1.0, -1.0, 0.0, 0.0, 0.5, -2.0, 0.0, 0.0]
    lost = total = 0.0
    for name, form in back.linears.items():
        source = weight if name == "decoder.layers.1.fc1" else dense.dense(name)
        expected = best_two(source) if form.pattern else source
        assert torch.equal(back.dense(name), expected), name
        if form.pattern:
            lost += float((source - expected).double().square().sum())
            total += float(source.double().square().sum())
    count = sum(form.pattern is not None for form in back.linears.values())
    assert count == 15
    assert lines[0] == (
        f"{count} of {count} sparse layers were pruned by magnitude, once: {(lost / total) ** 0.5:.2%} of the norm of "
        "all is gone"
    )


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "2:8", "4:8"])
def test_pruning_keeps_what_satisfies_the_pattern_to_the_bit(pattern: str) -> None:
    shape = Pattern.parse(pattern)
    values = torch.randn(64, 256 * shape.n // shape.m)
    values[torch.rand_like(values) < 0.3] = 0.0
    values[torch.rand_like(values) < 0.3] = -0.0
    # Not less than what could stand for -0.0.
    values[torch.rand_like(values) < 0.2] = 2.0**-149
    mask = codec.mask_of(CompressedMatrix.prune(torch.rand(64, 256), shape).indices, shape)
    dense = torch.zeros(64, 256).masked_scatter_(mask, values)
    assert same_bits(prune(dense, shape).expand(), dense)
    # More zeros with a sign than there is room for: no other number makes room for them.
    assert torch.equal(prune(torch.where(dense == 0, -0.0, dense), shape).expand(), dense)
    torch.testing.assert_close(prune(dense.abs(), shape).indices, CompressedMatrix.prune(dense.abs(), shape).indices)


def test_the_config_decides_which_layers_are_sparse_and_how(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """From 2:4 a layer becomes dense, another 4:8, which holds it, another 2:8, which does not."""
    sparse = model_of("opt 350M", tokenizer)
    config = config_for(
        sparse,
        tmp_path,
        corpus,
        sparsity={
            "dense_layers": ["*.out_proj"],
            "layer_patterns": ["decoder.layers.2.*=4:8", "*.fc2=2:8"],
            "column_mask_interval": 3,
        },
    )
    factory = layer_factory(config, derive(config), adapters=False, device="meta")
    build(config, factory)
    found = {name: form.pattern for name, form in forms_of(sparse.skeleton, config).items()}
    assert found == factory.sparse | dict.fromkeys(factory.dense)
    lines = begin_from(sparse, config).lines
    assert lines[0].startswith("2 of 12 sparse layers were pruned") and lines[1].startswith("10 of 12 ")
    back = begun(tmp_path)
    masks = read_all(newest(tmp_path / "run"), "metadata")
    for name, form in back.linears.items():
        expected = sparse.dense(name)
        if form.pattern == Pattern(2, 8):
            expected = CompressedMatrix.prune(expected, Pattern(2, 8)).expand()
        assert torch.equal(back.dense(name), expected), name
        if form.pattern is not None:
            matrix = back.matrix(name)
            kept = pruning.column_mask(matrix.values, matrix.indices, form.pattern)
            assert torch.equal(codec.unpack_bits(masks[f"{name}.weight.column_mask"]), kept), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masters_are_the_numbers_of_the_source(
    precision: str, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dense = model_of("llama", tokenizer, pattern=None)
    begin_from(dense, config_for(dense, tmp_path, corpus, precision=precision))
    back = begun(tmp_path)
    masters, weights = (read_all(newest(tmp_path / "run"), kind) for kind in ("master", "weight"))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert masters.keys() == weights.keys() and back.dtype == dtype
    for name, weight in weights.items():
        assert same_bits(weight, masters[name].to(dtype)), name
    for name, form in back.linears.items():
        values = masters[f"{name}.weight.values"]
        if form.pattern is None:
            assert same_bits(values, dense.dense(name)), name
        else:
            # Which are kept follows from the source, not from what rounding makes equal.
            matrix = CompressedMatrix(values, back.read(f"{name}.weight.indices"), form.pattern)
            assert torch.equal(matrix.expand(), best_two(dense.dense(name))), name


def test_adapters_are_merged_where_that_is_asked_for(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("gpt2", tokenizer, adapters=True)
    config = config_for(stored, tmp_path, corpus)
    with pytest.raises(UserError, match=r"^memory has adapters, .* give --merge-adapters to add them into"):
        begin_from(stored, config)
    assert not (tmp_path / "run").exists()
    lines = begin_from(stored, config, merge_adapters=True).lines
    assert "the adapters were merged into the weights before these were pruned" in lines
    back = begun(tmp_path)
    assert not back.has_adapters
    for name, form in stored.linears.items():
        merged = stored.dense(name)
        if form.adapter_rank:
            up, down = (stored.read(f"{name}.adapter.{part}").double() for part in ("up", "down"))
            merged = best_two(merged + (up @ down / form.adapter_rank).float())
        # A pair of almost equal magnitudes may be rounded to the other order.
        differing = (back.dense(name) - merged).abs() > 1e-5
        assert differing.sum() <= 2, name


def test_rotary_positions_allow_shorter_samples(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = model_of("mistral", tokenizer)
    begin_from(stored, config_for(stored, tmp_path, corpus, model={"sequence_length": 16}))
    assert begun(tmp_path).model.sequence_length == 16


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
    # The same pieces out of a file of other bytes are the same ids.
    copy = load_tokenizer(corpus)
    other = object.__new__(type(copy))
    vars(other).update(vars(copy) | {"sha256": "0" * 64})
    assert other.same_ids(copy) and not other.same_ids(load_tokenizer(other_corpus))


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
        ("decoder.embed_tokens.weight", 1e38, "fp32", "its loss in fp32 is (nan|inf), so no run could go on from it"),
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
