"""Configs that cannot be a run, or hardly: each is refused in one line that names what is wrong, or is a run.

The first kinds of change make a run impossible for certain, by the schema; the others change text at random, and what
is then accepted must come back the same from what is written for it.
"""

from __future__ import annotations

import json
import random
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args, get_origin

from slope_dist.config import Config, derive, dump_config, load_config
from slope_dist.config.messages import field_at, field_paths
from slope_dist.config.resolve import without_effect
from slope_dist.errors import UserError
from tests.faults.mutation import mutate_bytes, mutate_tree, write
from tests.faults.refusal import line_of
from tests.faults.valid_configs import members, ranks_of, valid_config

Named = Collection[str]
"""Keys of which a refusal must name one; for a misspelt one, with what leads to the right one."""


class ValidConfigs:
    """A run that the schema allows is accepted."""

    def __init__(self, shared: Path) -> None:
        pass

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        tree = valid_config(draw)
        ranks = ranks_of(tree, draw)
        path = room / "run.json"
        path.write_text(json.dumps(tree, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2])))
        try:
            config = load_config(path)
            derived = derive(config, ranks)
        except UserError as error:
            return f"refused for {ranks} ranks: {error}"
        if derived.world_size != ranks or derived.data_ranks * derived.accumulation_steps == 0:
            return f"derived {derived} for {ranks} ranks"
        return _comes_back(config, room)


class FuzzedConfigs:
    """One kind of change after the other, each on a run drawn anew."""

    def __init__(self, shared: Path) -> None:
        self.paths = field_paths()
        self.sure = [self.misspelt, self.wrong_type, self.out_of_range, impossible, no_config]
        self.random = [self.changed_tree, self.changed_bytes, self.changed_twice]

    def __call__(self, index: int, draw: random.Random, room: Path) -> str | None:
        changes: list[Any] = [*self.sure, *self.random]
        turn, which = divmod(index, len(changes))
        tree = valid_config(draw)
        ranks = ranks_of(tree, draw)
        path = room / "run.json"
        if which < len(self.sure):
            text, named, wanted = changes[which](turn, tree, draw)
            problem = _refused(path, text, wanted or ranks, named)
        else:
            path.write_bytes(changes[which](tree, draw))
            problem = _judged(path, draw.choice([ranks, draw.randrange(1, 100), 2**31]), self.paths)
        return problem and f"{changes[which].__name__} {turn}: {problem}"

    def misspelt(self, turn: int, tree: dict[str, Any], draw: random.Random) -> tuple[bytes, Named, None]:
        """Every key in turn, and every section, with one slip of the finger."""
        names = [*self.paths, *(name for name in Config.model_fields if isinstance(field_at([name]), type))]
        path = names[turn % len(names)]
        section, _, key = path.rpartition(".")
        parent = tree.setdefault(section, {}) if section else tree
        wrong = _slip(key, parent, draw)
        parent[wrong] = parent.pop(key) if key in parent and draw.random() < 0.5 else 1
        said = f"{section}.{wrong}" if section else wrong
        return json.dumps(tree).encode(), [f"{said}: unknown key; did you mean "], None

    def wrong_type(self, turn: int, tree: dict[str, Any], draw: random.Random) -> tuple[bytes, Named, None]:
        """Every key in turn, and every section, with a value of another type."""
        names = [*self.paths, *(name for name in Config.model_fields if isinstance(field_at([name]), type))]
        path = names[turn % len(names)]
        section, _, key = path.rpartition(".")
        wrong = (
            ["3", "true", 3, 2.5, True, None, [], [1], {}, {"a": 1}] if path in self.paths else ["a", 3, None, [], True]
        )
        fitting = [value for value in wrong if path not in self.paths or not _fits(value, path)]
        (tree.setdefault(section, {}) if section else tree)[key] = draw.choice(fitting)
        return json.dumps(tree).encode(), [path], None

    def out_of_range(self, turn: int, tree: dict[str, Any], draw: random.Random) -> tuple[bytes, Named, None]:
        """Every key in turn with a value that is too small, too large, unknown, or no path."""
        path = self.paths[turn % len(self.paths)]
        outside = [value for member in members(path) for value in _outside(member)]
        # A flag has no values outside; nor has a list whose members are free.
        if not outside:
            return self.wrong_type(turn, tree, draw)
        section, _, key = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = draw.choice(outside)
        return json.dumps(tree).encode(), [path], None

    def changed_tree(self, tree: dict[str, Any], draw: random.Random) -> bytes:
        """One random change of keys or values."""
        return write(mutate_tree(tree, draw))

    def changed_bytes(self, tree: dict[str, Any], draw: random.Random) -> bytes:
        """Random changes of the text."""
        text = json.dumps(tree).encode()
        for _ in range(draw.randrange(1, 4)):
            text = mutate_bytes(text, draw)
        return text

    def changed_twice(self, tree: dict[str, Any], draw: random.Random) -> bytes:
        """Two random changes of values."""
        tree = mutate_tree(tree, draw)
        return write(mutate_tree(tree, draw) if isinstance(tree, dict) else tree)


def impossible(turn: int, tree: dict[str, Any], draw: random.Random) -> tuple[bytes, Named, int | None]:
    """Values that are good each by itself."""
    ranks = ranks_of(tree, draw)
    model, training = tree["model"], tree["training"]
    parallel, checkpoint = (tree.setdefault(name, {}) for name in ("parallel", "checkpoint"))
    adapters, sparsity = (tree.setdefault(name, {}) for name in ("adapters", "sparsity"))
    tensor = parallel.get("tensor", 1)
    wanted: int | None = None

    def ranks_that_do_not_fit() -> Named:
        nonlocal wanted
        cut = tensor * parallel.setdefault("pipeline", 1)
        # Where data ranks are free, only a remainder is impossible.
        parallel.setdefault("data", ranks // cut)
        wanted = draw.choice([other for other in (ranks + 1, 2 * ranks, 3 * ranks, 10**6 + 1) if other != ranks])
        return ["parallel.tensor"]

    def a_batch_that_does_not_come_out_even() -> Named:
        training["global_batch_size"] += draw.randrange(1, training["micro_batch_size"] * 7 + 1)
        data = ranks // (tensor * parallel.get("pipeline", 1))
        parallel["data"] = data
        together = training["micro_batch_size"] * data
        if training["global_batch_size"] % together == 0:
            training["micro_batch_size"] = training["global_batch_size"] + 1
        return ["training.global_batch_size"]

    def resident_shards() -> Named:
        sparsity.update(pattern="2:4", backward_weight="resident", column_mask_interval=1)
        parallel.update(engine="deepspeed", zero_stage=3, pipeline=1)
        return ["sparsity.backward_weight"]

    recipes: list[Callable[[], Named]] = [
        lambda: _set(parallel, ["parallel.tensor"], tensor=model["num_heads"] + 1),
        lambda: _set(model, ["model.num_heads", "model.hidden_size"], num_heads=model["hidden_size"] - 1),
        lambda: _set(model, ["model.hidden_size"], hidden_size=model["hidden_size"] + draw.randrange(1, 8)),
        lambda: _set(model, ["model.ffn_size"], ffn_size=model["ffn_size"] + draw.randrange(1, 8)),
        lambda: _set(model, ["model.embedding_size"], embedding_size=8 * draw.randrange(9) + draw.randrange(1, 8)),
        lambda: _set(model, ["model.family"], family=draw.choice(["gpt3", "OPT", "qwen"])),
        lambda: _set(model, ["model.family"], family=draw.choice(["opt", "gpt2"]), rotary_base=3e5),
        lambda: _set(
            model, ["model.family", "model.num_kv_heads"], family="llama", num_kv_heads=model["num_heads"] + 1
        ),
        lambda: _set(model, ["model.family"], family="gpt2", tied_head=False),
        lambda: _set(adapters, ["adapters.rank"], rank=model["hidden_size"] + draw.randrange(1, 99)),
        lambda: _set(adapters, ["adapters.rank"], rank=draw.choice([-1, 0.0, 1.0, 1.5, -0.25])),
        lambda: _set(adapters, ["adapters.peak_learning_rate"], learning_rate_policy="follow", peak_learning_rate=1e-3),
        lambda: _without(
            adapters, "peak_learning_rate", ["adapters.peak_learning_rate"], learning_rate_policy="rewarm_all"
        ),
        lambda: _set(
            parallel, ["parallel.pipeline"], engine="deepspeed", zero_stage=0, pipeline=model["num_layers"] + 1
        ),
        lambda: _set(
            parallel, ["parallel.pipeline", "parallel.zero_stage"], engine="deepspeed", zero_stage=2, pipeline=2
        ),
        lambda: _set(parallel, ["parallel.pipeline"], engine="fsdp", pipeline=2),
        lambda: _set(tree, ["precision"], precision="fp16", parallel={"engine": "fsdp"}, sparsity={}),
        lambda: _set(sparsity, ["sparsity.column_mask_interval"], pattern="dense", column_mask_interval=2),
        lambda: _set(sparsity, ["sparsity.backward_weight"], pattern="2:8", backward_weight="resident"),
        lambda: _set(sparsity, ["sparsity.dense_layers"], dense_layers=["a", " "]),
        lambda: _set(training, ["training.min_learning_rate"], min_learning_rate=training["learning_rate"] * 1.01),
        lambda: _set(checkpoint, ["checkpoint.keep_every"], interval=draw.choice([0, 7]), keep_every=10),
        lambda: _set(
            tree, ["loss_scale.minimum"], loss_scale={"minimum": draw.choice([1.5, 2.0**20]), "initial_power": 9}
        ),
        lambda: _set(
            tree.setdefault("watch", {}), ["watch.first_step_timeout"], hang_timeout=700, first_step_timeout=699.5
        ),
        lambda: _set(parallel, ["parallel.alternatives[1]"], alternatives=[{"data": 1}, {"pipeline": 20_000}]),
        ranks_that_do_not_fit,
        a_batch_that_does_not_come_out_even,
        resident_shards,
    ]
    named = recipes[turn % len(recipes)]()
    return json.dumps(tree).encode(), named, wanted


def no_config(turn: int, tree: dict[str, Any], draw: random.Random) -> tuple[bytes, Named, None]:
    """Text that is no run's file, or only almost."""
    text = json.dumps(tree).encode()
    depth = draw.choice([40, 500, 100_000])
    first = next(iter(tree))
    texts = [
        *(
            b"",
            b" \n",
            b"null",
            b"[]",
            b"3",
            b'"run"',
            b"{",
            b"{}",
            b"\0" * 99,
            b"\xff\xfe" + text,
            text.decode().encode("utf-16"),
        ),
        *(
            text[: draw.randrange(1, len(text))],
            text + text,
            text + b"x",
            b"[" + text + b"]",
            b"'" + text,
            text.replace(b":", b"="),
        ),
        *(
            b"[" * depth,
            b'{"run":' * depth,
            b'{"run":' + b"[" * depth + b"]" * depth + b"}",
            text[:-1] + b',"run":{"a":' * depth,
        ),
        text[:-1] + f', "{first}": {json.dumps(tree[first])}}}'.encode(),
        text[:-1] + b', "run": {"seed": 1, "seed": 2}}' if "run" not in tree else text[:-1] + b', "run": {}}',
        *(
            text[:-1] + b', "loss_scale": {"minimum": ' + word + b"}}"
            for word in (b"NaN", b"Infinity", b"1e999", b"9" * 5000)
        ),
        text + b" " * (1 << 20),
        text[:-1] + b', "x": "' + b"x" * 100_000 + b'"}',
        text[:-1] + b', "' + b"k" * 100_000 + b'": 1}',
        json.dumps({name: tree[name] for name in tree if name != draw.choice(["model", "data", "training"])})[
            :-1
        ].encode(),
    ]
    return texts[turn % len(texts)], [], None


def _set(section: dict[str, Any], named: Named, **values: Any) -> Named:
    section.update(values)
    return named


def _without(section: dict[str, Any], key: str, named: Named, **values: Any) -> Named:
    section.pop(key, None)
    return _set(section, named, **values)


def _slip(key: str, taken: Collection[str], draw: random.Random) -> str:
    """A misspelling of a key that is no key."""
    while True:
        at = draw.randrange(len(key))
        wrong = draw.choice(
            [
                key[:at] + key[at + 1 :],
                key[:at] + key[at] + key[at:],
                key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
                key[:at] + draw.choice("abcdefghijklmnopqrstuvwxyz-_ é") + key[at + 1 :],
                key[:at] + draw.choice("abcdefghijklmnopqrstuvwxyz-_ é") + key[at:],
                key.replace("_", "-") + "s",
                f" {key}",
            ]
        )
        if wrong and wrong != key and wrong not in taken and wrong not in Config.model_fields:
            return wrong


def _fits(value: Any, path: str) -> bool:
    """Whether a key takes values of this value's type; or would, were they in range."""
    for member in members(path):
        kind = member.kind
        if get_origin(kind) is not None:
            if value in get_args(kind):
                return True
        elif kind is types.NoneType:
            if value is None:
                return True
        elif kind is tuple:
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return True
        elif isinstance(value, bool):
            if kind is bool:
                return True
        elif isinstance(value, kind) or (kind is float and isinstance(value, int)):
            return True
    return False


def _outside(member: Any) -> list[Any]:
    """Values of the right type that are not the member's."""
    kind, low, high, words = member
    if words:
        return [["unknown"], [words[0], ""], [words[0].upper()]]
    if get_origin(kind) is not None:
        return ["unknown", "", *(choice.upper() + "x" for choice in get_args(kind))]
    if kind is str:
        return ["", " \t", "a\0b", "x" * 4097]
    if kind is int:
        return [*([low - 1, -(10**30)] if low is not None else []), *([high + 1, 10**30] if high is not None else [])]
    if kind is float:
        return [*([low - 1, -1e300] if low is not None else []), *([high * 2 + 1, 1e300] if high is not None else [])]
    return []


def _refused(path: Path, text: bytes, ranks: int, named: Named) -> str | None:
    """What is wrong with the refusal of a text; none of `named` may be missing where there are any."""
    path.write_bytes(text)
    try:
        derive(load_config(path), ranks)
    except UserError as error:
        problem = line_of(error)
        if problem is None and not any(name in str(error) for name in named or [str(path)]):
            problem = f"none of {list(named) or path} is named in: {error}"
        return problem
    return "it was accepted"


def _judged(path: Path, ranks: int, paths: list[str]) -> str | None:
    """What is wrong with how any text at all was met."""
    try:
        config = load_config(path)
    except UserError as error:
        return line_of(error) or (None if str(path) in str(error) else f"the file is not named in: {error}")
    try:
        derive(config, ranks)
    except UserError as error:
        problem = line_of(error) or (
            None if any(name in str(error) for name in paths) else f"no key is named in: {error}"
        )
        if problem is not None:
            return problem
    return _comes_back(config, path.parent)


def _comes_back(config: Config, room: Path) -> str | None:
    """What is wrong if the written config is read to another, or says something in more than one line."""
    text = dump_config(config)
    path = room / "again.json"
    path.write_text(text, encoding="utf-8")
    again = load_config(path)
    if again != config or dump_config(again) != text:
        return "what is written for it is read otherwise"
    bad = [line for line in without_effect(config) if "\n" in line]
    return f"a note is not one line: {bad[0]}" if bad else None
