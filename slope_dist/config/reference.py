"""The config reference, generated from the schema: `python -m slope_dist.config.reference > docs/config.md`."""

from __future__ import annotations

import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from slope_dist.config.fields import Section
from slope_dist.config.messages import section_of_list
from slope_dist.config.schema import Config

_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}

_HEADER = """\
# Config reference

One JSON file describes a run; every key below can also be given as `--set section.key=value`. Unknown and duplicate
keys are errors. A key without a default is required. Steps count from 1.

Editors check a file and complete its keys by [config.schema.json](config.schema.json): name it at the top of the file
(`"$schema": "../docs/config.schema.json"`, the one key that is no part of the run) or in the editor's settings. It
knows single values; what must hold between them, only `--dry-run` tells.

This file is generated: `python -m slope_dist.config.reference > docs/config.md`.
"""


def render() -> str:
    """Return the reference as Markdown: a table of type, default and description for each section."""
    parts = [_HEADER]
    top = {}
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            parts.append(f"\n## {name}\n\n{_summary(kind)}\n\n{_table(kind.model_fields, f'{name}.')}")
            for key, inner in kind.model_fields.items():
                member = section_of_list(inner)
                if member is not None:
                    table = _table(member.model_fields, f"{name}.{key}[].")
                    parts.append(f"\n### {name}.{key}\n\n{_summary(member)}\n\n{table}")
        else:
            top[name] = field
    parts.insert(1, f"\n## Outside the sections\n\n{_table(top, '')}")
    return "".join(parts)


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").strip()


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"
        cells = [f"`{prefix}{name}`", _type(field.annotation) + _range(field), default, field.description or ""]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in get_args(kind))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(member) for member in get_args(kind))
    if origin is tuple:
        member = get_args(kind)[0]
        inside = isinstance(member, type) and issubclass(member, Section)
        return f"list of {'objects' if inside else _type(member)}"
    if hasattr(kind, "__metadata__"):
        return _type(get_args(kind)[0]) + _bounds(kind.__metadata__[0].metadata)
    return _NAMES[kind]


def _range(field: FieldInfo) -> str:
    return _bounds(field.metadata)


def _bounds(metadata: list[Any]) -> str:
    """Return the lower and upper limits in `metadata` as text; the upper ones only where they mean something."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = []
    for constraint in metadata:
        for name, word in words.items():
            value = getattr(constraint, name, None)
            if value is not None and value < 2**31 - 1:
                limits.append(f"{word} {value:.10g}")
    return f", {', '.join(limits)}" if limits else ""


if __name__ == "__main__":
    print(render(), end="")
