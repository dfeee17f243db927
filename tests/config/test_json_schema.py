"""docs/config.schema.json is what the code says: it takes every shipped config and refuses what is wrong.

The schema is read by a small validator of our own, which stops at any keyword that it does not know.

Run alone: pytest tests/config/test_json_schema.py
"""

import copy
import json
import re
from pathlib import Path

import pytest

from slope_dist.config import dump_config
from slope_dist.config.json_schema import render
from slope_dist.config.messages import field_at, field_paths

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "config.schema.json"
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
SCHEMA = json.loads(DOCUMENT.read_text())

TYPES = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
}
# JSON Schema's ranges and lengths say nothing of values of other types, which "type" refuses.
KEYWORDS = {
    "type": lambda value, wanted: TYPES[wanted](value),
    "enum": lambda value, wanted: value in wanted,
    "const": lambda value, wanted: value == wanted,
    "minimum": lambda value, limit: not TYPES["number"](value) or value >= limit,
    "maximum": lambda value, limit: not TYPES["number"](value) or value <= limit,
    "exclusiveMinimum": lambda value, limit: not TYPES["number"](value) or value > limit,
    "exclusiveMaximum": lambda value, limit: not TYPES["number"](value) or value < limit,
    "minLength": lambda value, limit: not isinstance(value, str) or len(value) >= limit,
    "maxLength": lambda value, limit: not isinstance(value, str) or len(value) <= limit,
    "pattern": lambda value, wanted: not isinstance(value, str) or re.search(wanted, value) is not None,
    "maxItems": lambda value, limit: not isinstance(value, list) or len(value) <= limit,
    "items": lambda value, inner: not isinstance(value, list) or all(accepts(inner, item) for item in value),
    "anyOf": lambda value, choices: any(accepts(choice, value) for choice in choices),
    "required": lambda value, names: not isinstance(value, dict) or set(names) <= set(value),
    "properties": lambda value, inner: (
        not isinstance(value, dict) or all(accepts(inner[name], value[name]) for name in inner.keys() & value.keys())
    ),
    "$ref": lambda value, name: accepts(SCHEMA["$defs"][name.removeprefix("#/$defs/")], value),
    **{word: lambda value, text: True for word in ("$schema", "$defs", "description", "default")},
}


def accepts(schema, value):
    """Whether `value` satisfies `schema`."""
    closed = schema.get("additionalProperties", True)
    assert closed in (True, False)
    if not closed and isinstance(value, dict) and not value.keys() <= schema["properties"].keys():
        return False
    return all(KEYWORDS[word](value, said) for word, said in schema.items() if word != "additionalProperties")


def inner(path):
    """The schema of one key."""
    found = SCHEMA
    for name in path.split("."):
        found = found["properties"][name]
        if "$ref" in found:
            found = SCHEMA["$defs"][found["$ref"].removeprefix("#/$defs/")]
    return found


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text() == render(), "run: python -m slope_dist.config.json_schema > docs/config.schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_satisfy_it(path, load):
    assert accepts(SCHEMA, json.loads(path.read_text()))
    assert accepts(SCHEMA, json.loads(dump_config(load(path.read_text()))))


def test_every_key_has_its_description_and_default():
    for path in field_paths():
        field, found = field_at(path.split(".")), inner(path)
        assert found["description"] == field.description, path
        if field.is_required():
            assert "default" not in found, path
        else:
            assert found["default"] == json.loads(json.dumps(field.get_default(call_default_factory=True))), path
            assert accepts({word: said for word, said in found.items() if word != "default"}, found["default"]), path


WRONG = {
    "unknown section": ("optimizer", {}),
    "unknown key": ("training.learning_rat", 0.1),
    "missing section": ("data", None),
    "missing key": ("model.num_heads", None),
    "text for a number": ("training.steps", "100"),
    "number for text": ("data.folder", 3),
    "number for true": ("training.compile", 1),
    "true for a number": ("training.steps", True),
    "fraction of a step": ("training.steps", 1.5),
    "too small": ("training.steps", 0),
    "too large": ("parallel.zero_stage", 4),
    "at the open end": ("training.beta2", 1.0),
    "below zero": ("adapters.rank", -1),
    "more than all": ("adapters.rank", 1.5),
    "no such choice": ("precision", "fp8"),
    "no such choice or null": ("parallel.gpu", "v100"),
    "no such source": ("data.source", "c4"),
    "one of a list": ("sparsity.vendors", ["cusparselt", "mkl"]),
    "text for a list": ("sparsity.dense_layers", "*.fc2"),
    "no pattern": ("sparsity.layer_patterns", ["*.fc2=3:4"]),
    "no weight": ("data.mixture", ["data/code"]),
    "an empty path": ("run.folder", " "),
    "a list for a section": ("model", []),
    "a list for a number": ("training.warmup_steps", [1]),
    "a schema that is no text": ("$schema", 7),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_by_it_and_by_the_loader(what, minimal, refusal):
    path, value = WRONG[what]
    if path == "data.mixture":
        del minimal["data"]["folder"]
    right = copy.deepcopy(minimal)
    *section, key = path.split(".")
    target = minimal.setdefault(section[0], {}) if section else minimal
    if value is None:
        del target[key]
    else:
        target[key] = value
    assert accepts(SCHEMA, right) and not accepts(SCHEMA, minimal)
    assert path in refusal(minimal)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("adapters.rank", 0),
        ("adapters.rank", 0.5),
        ("data.mixture", ["data/a=0.5", "b/=1/3"]),
        ("sparsity.layer_patterns", ["*.fc1=1:2", "a=b=4:8"]),
        ("run.threads", None),
        ("sparsity.vendors", []),
    ],
)
def test_what_the_loader_takes_it_takes(path, value, minimal, load):
    section, key = path.split(".")
    if path == "data.mixture":
        del minimal["data"]["folder"]
    minimal.setdefault(section, {})[key] = value
    load(minimal)
    assert accepts(SCHEMA, minimal)


def test_a_file_may_name_the_schema_and_is_the_same_run(minimal, load, refusal):
    named = {"$schema": "../docs/config.schema.json", **minimal}
    assert load(named) == load(minimal)
    assert "$schema" not in json.loads(dump_config(load(named)))
    assert accepts(SCHEMA, named)
    # Only there, only once, and not from the command line.
    assert refusal(minimal | {"model": {"$schema": "x", **minimal["model"]}}).startswith("model.$schema: unknown key")
    assert refusal('{"$schema": "a", "$schema": "b"}').startswith("$schema: the key is given twice")
    assert refusal(minimal, ["$schema=x"]).startswith("--set $schema: unknown key")
