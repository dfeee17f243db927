"""Runs that are possible, drawn from the schema: any value that a key may hold, and what must hold between them."""

from __future__ import annotations

import random
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from slope_dist.config.messages import field_at, field_paths

_LONGEST_PATH = 4096


class Member(NamedTuple):
    """One thing a key may hold: its type, and the least and the greatest of it (both allowed; None: no limit).

    Of a list, ``words`` are the ones it may consist of, if not any.
    """

    kind: Any
    low: float | None = None
    high: float | None = None
    words: tuple[str, ...] = ()


def members(path: str) -> list[Member]:
    """What the key of a dotted path may hold."""
    field = field_at(path.split("."))
    assert isinstance(field, FieldInfo)
    return _members(field.annotation, list(field.metadata))


def required(path: str) -> bool:
    """Whether the key has no default."""
    field = field_at(path.split("."))
    assert isinstance(field, FieldInfo)
    return field.is_required()


def _members(annotation: Any, metadata: list[Any]) -> list[Member]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [member for inner in get_args(annotation) for member in _members(inner, metadata)]
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _members(inner, [*metadata, *more])
    if origin is Literal:
        return [Member(annotation)]
    if origin is tuple and get_origin(get_args(annotation)[0]) is Literal:
        return [Member(tuple, words=get_args(get_args(annotation)[0]))]
    limits: dict[str, float] = {}
    for entry in metadata:
        # A field's limits come as one FieldInfo inside an alias and one object for each elsewhere.
        for item in [entry, *getattr(entry, "metadata", [])]:
            limits |= {name: getattr(item, name) for name in ("ge", "gt", "le", "lt") if hasattr(item, name)}
    step = 1 if annotation is int else 1e-9
    low = limits["gt"] + step if "gt" in limits else limits.get("ge")
    high = limits["lt"] - step if "lt" in limits else limits.get("le")
    return [Member(origin or annotation, low, high)]


def possible(member: Member, draw: random.Random) -> Any:
    """A value of the member's."""
    kind, low, high, words = member
    if get_origin(kind) is Literal:
        return draw.choice(get_args(kind))
    if kind is bool:
        return draw.random() < 0.5
    if kind is int:
        low, high = int(low or 0), int(2**31 if high is None else high)
        return draw.choice([low, high, draw.randint(low, high), min(high, low + draw.randrange(9))])
    if kind is float:
        low, high = low or 0.0, 1e6 if high is None else high
        return draw.choice([low, high, draw.uniform(low, high), low + (high - low) * 10.0 ** -draw.randrange(9)])
    if kind is str:
        return draw.choice(["a", "runs/x y", "/tmp/é", "x" * _LONGEST_PATH, "../..", "\u4e2d\u6587", "a\nb"])
    if kind is tuple:
        words = words or ("decoder.layers.0.*", "*fc1", "*", "[", "é")
        return draw.sample(words, draw.randrange(min(4, len(words) + 1)))
    assert kind is types.NoneType, f"valid_configs.py does not know how to draw {kind}"
    return None


def valid_config(draw: random.Random) -> dict[str, Any]:
    """A run that is possible, as the tree of its file."""
    tree: dict[str, Any] = {}
    related = _RELATED | {path for path in field_paths() if path.split(".")[0] == "loss_scale"}
    for path in field_paths():
        if path not in related and (required(path) or draw.random() < 0.4):
            _set(tree, path, possible(draw.choice(members(path)), draw))
    for path, value in _related(draw).items():
        if value is not None:
            _set(tree, path, value)
    # The order of keys means nothing.
    return {name: tree[name] for name in draw.sample(list(tree), len(tree))}


def ranks_of(tree: dict[str, Any], draw: random.Random) -> int:
    """A number of ranks on which a possible run is possible."""
    parallel = tree.get("parallel", {})
    cut = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    batches = tree["training"]["global_batch_size"] // tree["training"]["micro_batch_size"]
    return cut * (parallel.get("data") or draw.choice([n for n in range(1, 17) if batches % n == 0]))


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[key] = value


# Keys whose values hang together: drawn below, not one by one.
_RELATED = {
    *(f"model.{key}" for key in ("family", "hidden_size", "num_heads", "ffn_size", "embedding_size", "num_layers")),
    *(f"model.{key}" for key in ("num_kv_heads", "norm_position", "tied_head")),
    *(f"model.rotary_{key}" for key in ("base", "scaling", "low_factor", "high_factor", "original_length")),
    *(
        "model.sequence_length",
        "sparsity.layer_patterns",
        "sparsity.pattern",
        "sparsity.column_mask_interval",
        "sparsity.backward_weight",
    ),
    *(f"adapters.{key}" for key in ("rank", "learning_rate_policy", "peak_learning_rate", "warmup_steps")),
    *(f"training.{key}" for key in ("global_batch_size", "micro_batch_size", "learning_rate", "min_learning_rate")),
    "training.compile",
    *(f"watch.{key}" for key in ("hang_timeout", "first_step_timeout")),
    *(f"parallel.{key}" for key in ("engine", "tensor", "pipeline", "data", "zero_stage", "sequence_parallel")),
    "parallel.alternatives",
    *("precision", "checkpoint.interval", "checkpoint.keep_every", "data.folder", "data.mixture", "data.source"),
}


def _related(draw: random.Random) -> dict[str, Any]:
    """Values that go together; None where a key is left out."""
    engine = draw.choice(["deepspeed", "fsdp"])
    tensor = draw.choice([1, 1, 2, 3, 4, 8])
    layers = draw.choice([1, 2, 3, 12, 10_000])
    pipeline = draw.randint(1, min(layers, 4)) if engine == "deepspeed" else 1
    stage = draw.choice([0, 1]) if pipeline > 1 else draw.choice([0, 1, 2, 3])
    precision = draw.choice(["bf16", "fp32"] if engine == "fsdp" else ["bf16", "fp16", "fp32"])
    share = draw.randint(1, 6)
    heads = tensor * share
    family = draw.choice([None, "opt", "gpt2", "llama", "mistral"])
    opt, rotary = family in (None, "opt"), family in ("llama", "mistral")
    low = draw.choice([1.0, 0.5, 3])
    hidden = heads * 8 * draw.randint(2, 20)
    data = draw.choice([None, 1, 2, 3])
    micro = draw.choice([1, 2, 5])
    pattern = draw.choice(["dense", "1:2", "2:4", "2:8", "4:8"])
    whole_weights = engine == "deepspeed" and stage < 3
    others = draw.choice([None, [], ["*fc2=2:8", "[=1:2"]]) if pattern != "dense" else draw.choice([None, []])
    resident = ["resident"] if pattern == "2:4" and not others and whole_weights else []
    rate = 10.0 ** -draw.randrange(1, 6)
    policy = draw.choice([None, "follow", "rewarm_adapters", "rewarm_all"])
    rewarm = policy not in (None, "follow")
    interval = draw.choice([None, 0, 1, 10, 500])
    power = draw.choice([None, 0, 16, 32])
    hang = draw.choice([600.0, 1.0, 7, 1e7])
    mixture = draw.choice([None, [], ["data/a=1", "/b c=0.25"], ["é=1/3"]])

    def maybe(value: Any) -> Any:
        return draw.choice([None, value])

    return {
        "model.family": family,
        "model.hidden_size": hidden,
        "model.num_heads": heads,
        "model.ffn_size": 8 * tensor * draw.randint(1, 40),
        "model.embedding_size": maybe(8 * draw.randint(1, 100)) if opt else None,
        "model.norm_position": draw.choice([None, "pre", "post"] if opt else [None, "pre"]),
        "model.num_kv_heads": maybe(tensor * draw.choice([n for n in range(1, 7) if share % n == 0]))
        if rotary
        else None,
        "model.tied_head": draw.choice([None, True, False] if rotary else [None, True]),
        "model.rotary_base": draw.choice([5e5, 1e-9, 1e30]) if rotary else maybe(10_000),
        "model.rotary_scaling": maybe(8.0) if rotary else None,
        "model.rotary_low_factor": low if rotary else maybe(1.0),
        "model.rotary_high_factor": low + draw.choice([1e-3, 3.0, 1e9]) if rotary else maybe(4),
        "model.rotary_original_length": maybe(draw.choice([1, 2**24])) if rotary else maybe(8192),
        "model.num_layers": layers,
        "model.sequence_length": tensor * draw.randint(1, 300),
        "sparsity.pattern": pattern,
        "sparsity.layer_patterns": others,
        "sparsity.column_mask_interval": maybe(1 if pattern == "dense" else draw.choice([1, 7, 2**31 - 1])),
        "sparsity.backward_weight": draw.choice([None, "auto", "derived", *resident]),
        "adapters.rank": draw.choice([None, 0, 1, draw.randint(1, hidden), hidden, 1e-9, draw.uniform(1e-9, 0.9)]),
        "adapters.learning_rate_policy": policy,
        "adapters.peak_learning_rate": rate if rewarm else None,
        "adapters.warmup_steps": maybe(draw.choice([0, 5]) if rewarm else 0),
        "data.folder": None if mixture else draw.choice(["a", "/tmp/é", "x" * _LONGEST_PATH, "../..", "a\nb"]),
        "data.mixture": mixture,
        "data.source": None if mixture else maybe("python-stdlib"),
        "training.micro_batch_size": micro,
        "training.global_batch_size": micro * (data or 1) * draw.choice([1, 2, 3, 8]),
        "training.learning_rate": rate,
        "watch.hang_timeout": hang,
        "watch.first_step_timeout": None if hang == 600.0 else max(hang, 600.0),
        "training.compile": draw.choice([None, False, engine == "fsdp" or stage < 3]),
        "training.min_learning_rate": draw.choice([None, 0.0, 0, rate, rate / 3]),
        "parallel.engine": engine,
        "parallel.tensor": tensor if tensor > 1 else maybe(1),
        "parallel.pipeline": pipeline if pipeline > 1 else maybe(1),
        "parallel.data": data,
        "parallel.zero_stage": stage,
        "parallel.sequence_parallel": maybe(draw.random() < 0.5),
        # One stage, one sample and one tensor rank are possible in each of these runs.
        "parallel.alternatives": maybe(
            draw.choice([[], [{"pipeline": 1}], [{"tensor": 1, "data": None}, {"micro_batch_size": 1, "data": 1}]])
        ),
        "precision": precision,
        "loss_scale.initial_power": power,
        "loss_scale.minimum": maybe(draw.choice([1, 1.0, 2.0 ** (16 if power is None else power)])),
        "loss_scale.window": maybe(5),
        "checkpoint.interval": interval,
        "checkpoint.keep_every": maybe((1000 if interval is None else interval) * draw.randint(1, 4) or None),
    }
