"""A run's file is read strictly: bad text, bad keys and bad values are one line each, good ones survive a round trip.

Run alone: pytest tests/config/test_loading.py
"""

import json
import os
import random
from pathlib import Path

import pytest

from slope_dist.config import dump_config, load_config
from slope_dist.config.messages import field_at, field_paths
from slope_dist.errors import UserError
from slope_dist.layers import LayerFactory
from slope_dist.training.build import build

CONFIGS = Path(__file__).parents[2] / "configs"
# Name and parameters of the published sizes, in millions.
OPT_SIZES = {
    "opt125m": 125,
    "opt350m": 331,
    "opt1.3b": 1316,
    "opt2.7b": 2652,
    "opt6.7b": 6658,
    "opt13b": 12853,
    "opt30b": 29974,
    "opt66b": 65718,
}

PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
}
"""Parameters of the published models, as transformers counts them."""


def test_every_shipped_config_loads():
    paths = sorted(CONFIGS.glob("*.json"))
    assert {path.stem for path in paths} >= {"tiny", *OPT_SIZES, *PUBLISHED}
    for path in paths:
        config = load_config(path)
        assert config.run.folder == f"runs/{path.stem}"


@pytest.mark.parametrize("name", OPT_SIZES)
def test_opt_configs_have_the_published_sizes(name):
    model = load_config(CONFIGS / f"{name}.json").model
    hidden, ffn, width = model.hidden_size, model.ffn_size, model.token_embedding_size
    block = 4 * hidden * hidden + 2 * hidden * ffn + 9 * hidden + ffn
    parameters = (
        model.num_layers * block
        + model.vocab_size * width
        + (model.sequence_length + 2) * hidden
        + (2 * hidden * width if width != hidden else 0)
        + (2 * hidden if model.norm_position == "pre" else 0)
    )
    assert parameters == pytest.approx(OPT_SIZES[name] * 1e6, rel=2e-3)


@pytest.mark.parametrize("name", OPT_SIZES)
def test_opt_configs_train_180_billion_tokens(name):
    config = load_config(CONFIGS / f"{name}.json")
    tokens = config.training.steps * config.training.global_batch_size * config.model.sequence_length
    assert tokens == pytest.approx(180e9, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_configs_have_the_published_number_of_parameters(name):
    config = load_config(CONFIGS / f"{name}.json")
    factory = LayerFactory(seed=0, pattern=None, device="meta")
    model = build(config, factory)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_tiny_runs_on_up_to_four_data_ranks():
    config = load_config(CONFIGS / "tiny.json")
    assert config.training.global_batch_size >= 8
    assert config.parallel.zero_stage == 1
    assert config.model.num_heads % 4 == 0 and config.model.num_layers % 4 == 0
    for ranks in (1, 2, 4):
        assert config.training.global_batch_size % (config.training.micro_batch_size * ranks) == 0


def test_dump_loads_to_the_same_run(minimal, load):
    minimal["sparsity"] = {"dense_layers": ["decoder.layers.1.*"]}
    config = load(minimal, ["adapters.rank=8", "training.epsilon=1e-7"])
    again = load(dump_config(config))
    assert again == config
    assert load(minimal) != config


def test_dump_writes_every_field(minimal, load):
    tree = json.loads(dump_config(load(minimal)))
    written = [f"{name}.{key}" for name, section in tree.items() if isinstance(section, dict) for key in section]
    assert {*written, "precision"} == set(field_paths())


def test_folder_follows_the_file_name_unless_given(minimal, load):
    assert load(minimal).run.folder == "runs/run"
    assert load(minimal, ["run.folder=/tmp/x"]).run.folder == "/tmp/x"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("[]", "holds a list of 0, where a JSON object"),
        ("3", "holds 3, where a JSON object"),
        ("null", "holds null, where a JSON object"),
        ('{"run": {"seed": 1,}}', "line 1, column 20: not JSON"),
        ('{\n  "run": {}\n  "model": {}\n}', "line 3, column 3: not JSON: Expecting ',' delimiter"),
        ('{"run": {}} x', "line 1, column 13: not JSON: Extra data"),
        ("{'run': {}}", "line 1, column 2: not JSON"),
        (b'{\n"run": {"folder": "\xff"}}', "line 2: not UTF-8 text"),
        ('{"training": {"learning_rate": NaN}}', "NaN is not JSON"),
        ('{"training": {"learning_rate": -Infinity}}', "-Infinity is not JSON"),
        ('{"run": {"seed": ' + "9" * 5000 + "}}", "a number of 5000 digits (999999999999...)"),
        ('{"run": {"seed": 1, "seed": 1}}', "run.seed: the key is given twice"),
        ('{"run": {}, "run": {}}', "run: the key is given twice"),
        ('{"a": [0, {"b": {"c": 1, "c": 2}}]}', "a[1].b.c: the key is given twice"),
        ('{"run": {"folder": "\\ud800"}}', "run.folder: holds half of a surrogate pair"),
        ('{"run": {"\\udfff": 1}}', "run: holds half of a surrogate pair"),
        ("[" * 100_000, "is nested more than 32 levels deep"),
        ('{"run":' * 500 + "0" + "}" * 500, "is nested more than 32 levels deep"),
        ('{"run": ' + "[" * 50 + "]" * 50 + "}", "is nested more than 32 levels deep"),
        ("{" + " " * (1 << 20) + "}", "is larger than 1048576 bytes"),
    ],
)
def test_text_that_is_no_config(refusal, content, expected):
    assert refusal(content).startswith(expected)


def test_a_byte_order_mark_is_harmless(minimal, load):
    assert load(b"\xef\xbb\xbf" + json.dumps(minimal).encode()) == load(minimal)


def test_unreadable_files(tmp_path, minimal):
    with pytest.raises(UserError, match=r"there is no such file; did you mean .*tiny\.json\?"):
        load_config(CONFIGS / "tinny.json")
    with pytest.raises(UserError, match=r"there is no such file$"):
        load_config(tmp_path / "absent" / "run.json")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_config("run\0.json")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        load_config("x" * 300)
    with pytest.raises(UserError, match=r"^the config's name is empty; give the JSON file of a run"):
        load_config("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load_config(path)


def test_overrides(minimal, load):
    config = load(
        minimal,
        [
            "training.steps=7",
            "precision=fp32",
            "run.folder=runs/a=b",
            'data.folder="with space"',
            "model.embedding_size=null",
            'sparsity.dense_layers=["decoder.layers.0.*"]',
            "parallel.sequence_parallel=false",
            "adapters.rank=0.5",
        ],
    )
    assert config.training.steps == 7
    assert config.precision == "fp32"
    assert (config.run.folder, config.data.folder) == ("runs/a=b", "with space")
    assert config.model.embedding_size is None
    assert config.sparsity.dense_layers == ("decoder.layers.0.*",)
    assert config.adapters.rank == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", '--set "training.steps": write section.key=value'),
        ("=3", '--set "=3": write section.key=value'),
        ("training.stepz=3", "--set training.stepz: unknown key; did you mean training.steps?"),
        ("trainig.steps=3", "--set trainig.steps: unknown key; did you mean training.steps?"),
        ("trainig.stepz=3", "--set trainig.stepz: unknown key; did you mean training.steps?"),
        ("zero_stage=3", "--set zero_stage: unknown key; did you mean parallel.zero_stage?"),
        ("training.steps.x=3", "--set training.steps.x: unknown key; did you mean training.steps?"),
        ("training.zero_stage=3", "--set training.zero_stage: unknown key; did you mean parallel.zero_stage?"),
        ("folder=x", "--set folder: unknown key; did you mean run.folder or data.folder?"),
        ("training.qqqqqq=3", "--set training.qqqqqq: unknown key; training has steps, global_batch_size,"),
        ("qqqqqq=3", "--set qqqqqq: unknown key; the sections are run, model,"),
        ("training={}", "--set training: names a section"),
        ("training.steps=0", "training.steps: must be at least 1, not 0 (from --set)"),
        ("training.steps=ten", 'training.steps: must be a whole number, not "ten" (from --set)'),
        ("training.learning_rate=NaN", "--set training.learning_rate: NaN is not JSON"),
        ("training.learning_rate=1e999", "training.learning_rate: must be a finite number"),
        ('run.folder={"a": 1, "a": 2}', "--set run.folder.a: the key is given twice"),
        ("run.folder=" + "[" * 100_000, "--set run.folder: is nested more than 32 levels deep"),
        ("run.folder=7", "run.folder: must be a string, or null, not 7 (from --set)"),
        ("run.folder=\udcff", "--set run.folder: holds half of a surrogate pair"),
    ],
)
def test_bad_overrides(minimal, refusal, override, expected):
    assert refusal(minimal, [override]).startswith(expected)


def test_an_override_given_twice_is_refused(minimal, refusal):
    message = refusal(minimal, ["training.steps=3", "training.steps=3"])
    assert message == "--set training.steps: is given twice; keep one of them"


def test_an_override_can_fill_in_a_required_key(minimal, load, refusal):
    del minimal["data"], minimal["training"]["steps"]
    assert refusal(minimal) == (
        "data: is required: Corpus and tokenizer; "
        "training.steps: is required: Optimizer steps of the run; steps count from 1"
    )
    assert load(minimal, ["data.folder=d", "training.steps=9"]).training.steps == 9


JUNK = [
    None,
    True,
    0,
    -1,
    3,
    2**31,
    2**63,
    10**39,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "3",
    "2:4",
    "\x00",
    "a\nb",
    "\ud800",
    "fp16",
    [],
    [1],
    ["*"],
    {},
    {"folder": 1},
    [[[[]]]],
]


def mutated(rng, tree):
    """Return `tree` with some places deleted, renamed, replaced or added, as text that may have bad bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        section = rng.choice([tree, *[value for value in tree.values() if isinstance(value, dict)]])
        kind = rng.randrange(4)
        if kind == 3:
            path = rng.choice(field_paths()).split(".")
            target = tree if len(path) == 1 else tree.setdefault(path[0], {})
            if isinstance(target, dict):
                field = field_at(path)
                harmless = rng.random() < 0.5 and not field.is_required()
                target[path[-1]] = field.get_default(call_default_factory=True) if harmless else rng.choice(JUNK)
        elif section:
            key = rng.choice(list(section))
            value = section.pop(key)
            if kind == 0:
                section[key] = rng.choice(JUNK)
            elif kind == 1:
                section[key[: rng.randrange(len(key) + 1)] + rng.choice(["", "x", "é", "\ud800", "\n"])] = value
    raw = bytearray(json.dumps(tree).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 2)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    if rng.random() < 0.05:
        del raw[rng.randrange(len(raw)) :]
    return bytes(raw)


def test_mutated_configs_load_or_are_refused_in_one_line(minimal, load):
    rng = random.Random(20240525)
    loaded = refused = 0
    for _ in range(1000):
        content = mutated(rng, json.loads(json.dumps(minimal)))
        overrides = []
        if rng.random() < 0.3:
            overrides = [f"{rng.choice(field_paths())}={json.dumps(rng.choice(JUNK))}"]
        try:
            config = load(content, overrides)
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1200, repr(str(error))
        else:
            loaded += 1
            assert load(dump_config(config)) == config
    assert loaded > 20 and refused > 400, (loaded, refused)
