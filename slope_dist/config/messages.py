"""What a user reads when a config is wrong: pydantic's errors as short lines with dotted paths and nearest names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from slope_dist.config.fields import Section
from slope_dist.config.schema import Config

_MAX_EXPLAINED = 3
# A file that is no config at all can hold thousands of faults.
_MAX_READ = 40
_MAX_NAME = 100

# What a value must be, by pydantic's name of the failure; ranges are told with their limit.
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "an object of keys",
    "model_attributes_type": "an object of keys",
    "finite_number": "a finite number",
    "string_unicode": "text in Unicode",
}
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def field_at(names: Sequence[str | int]) -> type[Section] | FieldInfo | None:
    """Return the section class or the field that the path `names` leads to, None where there is none."""
    found: type[Section] | FieldInfo = Config
    for name in names:
        if isinstance(name, int) and isinstance(found, FieldInfo):
            member = section_of_list(found)
            if member is None:
                return None
            found = member
            continue
        if not isinstance(found, type) or name not in found.model_fields:
            return None
        field = found.model_fields[str(name)]
        kind = field.annotation
        found = kind if isinstance(kind, type) and issubclass(kind, Section) else field
    return found


def section_of_list(field: FieldInfo) -> type[Section] | None:
    """Return the class of the objects that a field is a list of; None for any other field."""
    if get_origin(field.annotation) is not tuple:
        return None
    member = get_args(field.annotation)[0]
    return member if isinstance(member, type) and issubclass(member, Section) else None


def field_paths() -> list[str]:
    """Return the dotted path of every key that holds a value, in the schema's order."""
    paths = []
    for name in Config.model_fields:
        found = field_at([name])
        paths += [f"{name}.{key}" for key in found.model_fields] if isinstance(found, type) else [name]
    return paths


def close_names(name: str, candidates: Iterable[str]) -> list[str]:
    """Return the candidates most like `name`, the nearest first; empty where none is near."""
    if len(name) > _MAX_NAME:
        return []
    return difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6)


def nearest_paths(names: Sequence[str | int]) -> list[str]:
    """Return the dotted paths a user most likely meant by `names`, which lead nowhere; empty where none is near."""
    last = str(names[-1])
    paths = field_paths()
    section = field_at(names[:-1])
    if isinstance(section, type) and any(isinstance(name, int) for name in names):
        return [_dotted([*names[:-1], near]) for near in close_names(last, section.model_fields)[:1]]
    # A right key in the wrong section ("training.zero_stage") beats a similar key of that section.
    elsewhere = [path for path in paths if path.rpartition(".")[2] == last]
    if elsewhere:
        return elsewhere
    if isinstance(section, type):
        near = close_names(last, section.model_fields)
        if near:
            return [_dotted([*names[:-1], near[0]])]
    else:
        near = close_names(_dotted(names), paths)
        if near:
            return near[:1]
    keys = {path.rpartition(".")[2]: path for path in paths}
    return [keys[key] for key in close_names(last, keys)[:1]]


def unknown_key(names: Sequence[str | int]) -> str:
    """Say that the path `names` leads nowhere, and what is nearest to it or what there is instead."""
    path = _dotted(names)
    near = nearest_paths(names)
    if near:
        return f"{path}: unknown key; did you mean {' or '.join(near)}?"
    section = field_at(names[:-1])
    if isinstance(section, type) and len(names) > 1:
        return f"{path}: unknown key; {_dotted(names[:-1])} has {', '.join(section.model_fields)}"
    return f"{path}: unknown key; the sections are {', '.join(Config.model_fields)}"


def shown(value: Any) -> str:
    """Return a short form of a JSON value for a message."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def explain(error: ValidationError, overridden: Collection[str]) -> str:
    """Return what is wrong with a config, at most three faults, the most telling first.

    `overridden` are the dotted paths that came from the command line, which the messages then say.
    """
    unknown, wrong, missing = {}, {}, {}
    suggested: set[str] = set()
    for details in error.errors()[:_MAX_READ]:
        location = _within_schema(details["loc"])
        path = _dotted(location)
        if details["type"] == "extra_forbidden":
            names = details["loc"]
            unknown[path] = unknown_key(names)
            suggested.update(nearest_paths(names))
        elif details["type"] == "missing":
            missing[path] = f"{path}: is required: {_description(location)}"
        elif path not in wrong:
            wrong[path] = _wrong_value(details, location, path) + (" (from --set)" if path in overridden else "")
    # A misspelt key is both unknown and missing; one message is enough.
    parts = [
        *unknown.values(),
        *wrong.values(),
        *(text for path, text in missing.items() if path not in suggested),
    ]
    return "; ".join(parts[:_MAX_EXPLAINED]) + ("; and more" if len(parts) > _MAX_EXPLAINED else "")


def _within_schema(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Cut off what pydantic adds behind the field: the members of a union it tried."""
    for length in range(len(location) + 1):
        if isinstance(field_at(location[:length]), FieldInfo) and field_at(location[: length + 1]) is None:
            inner = location[length : length + 1]
            return location[:length] + (inner if inner and isinstance(inner[0], int) else ())
    return location


def _dotted(location: Sequence[str | int]) -> str:
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in location).lstrip(".")


def _description(location: Sequence[str | int]) -> str:
    name = str(location[-1])
    section = field_at(location[:-1])
    assert isinstance(section, type)
    return (section.model_fields[name].description or "").rstrip(".")


def _wrong_value(details: ErrorDetails, location: Sequence[str | int], path: str) -> str:
    kind, value = details["type"], details["input"]
    context = details.get("ctx", {})
    field = field_at(location)
    if kind == "value_error":
        # The checks of a whole section name the keys they are about themselves.
        return str(context["error"]) if isinstance(field, type) else f"{path}: {context['error']}"
    if path == "adapters.rank":
        expected = "a whole number, or a fraction between 0 and 1"
    elif kind == "literal_error":
        expected = "one of " + context["expected"].replace("'", '"').replace(" or ", ", ")
    elif kind in _LIMITS:
        word, key = _LIMITS[kind]
        expected = f"{word} {context[key]:.10g}"
    elif kind in _EXPECTED:
        expected = _EXPECTED[kind]
    else:
        return f"{path}: {details['msg']}, not {shown(value)}"
    if isinstance(field, FieldInfo) and type(None) in get_args(field.annotation):
        expected += ", or null"
    hint = "; numbers, true and false stand without quotes" if _needs_no_quotes(kind, value) else ""
    return f"{path}: must be {expected}, not {shown(value)}{hint}"


def _needs_no_quotes(kind: str, value: Any) -> bool:
    if kind not in ("int_type", "float_type", "bool_type") or not isinstance(value, str):
        return False
    try:
        return not isinstance(json.loads(value), str)
    except (ValueError, RecursionError):
        return False
