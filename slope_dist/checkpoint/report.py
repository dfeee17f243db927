"""What was found in checkpoints, for people and as JSON. No text of a checkpoint can make a terminal do anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slope_dist.checkpoint.comparison import ABSENT, Differences
from slope_dist.checkpoint.inspection import LayerNumbers, Totals
from slope_dist.checkpoint.reader import Checkpoint
from slope_dist.checkpoint.stored_layers import stored_layers
from slope_dist.output import visible
from slope_dist.transfer import size_text

Line = str | Table

_PIPED_WIDTH = 1000
_LONGEST = 60
_MOST_SCALARS = 40


def print_lines(lines: Iterable[Line]) -> None:
    """Print lines and tables; where no terminal reads them, nothing is folded to its width."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    for line in lines:
        if isinstance(line, Table):
            # Rich itself would end the program where a pipe is closed, and fills lines with spaces.
            with console.capture() as capture:
                console.print(line)
            print("\n".join(text.rstrip() for text in capture.get().splitlines()))
        else:
            print(visible(line))


def to_json(content: Mapping[str, Any]) -> str:
    """JSON in ASCII. NaN and infinity, which JSON does not have, are the strings "nan", "inf" and "-inf"."""
    return json.dumps(_without_nan(content), indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def report(checkpoint: Checkpoint, totals: Totals, layers: list[LayerNumbers]) -> list[Line]:
    """What a checkpoint holds: a list of facts, a table of layers, and what of the layers does not fit together."""
    problems = [f"does not fit together: {text}" for text in _problems(checkpoint)]
    facts = _facts(checkpoint, totals)
    width = max(map(len, facts))
    return [*(f"{name:<{width}}  {text}" for name, text in facts.items()), _layer_table(layers), *problems]


def _problems(checkpoint: Checkpoint) -> list[str]:
    return [layer.problem for layer in stored_layers(checkpoint.manifest) if layer.problem is not None]


def _facts(checkpoint: Checkpoint, totals: Totals) -> dict[str, str]:
    scalars, versions = checkpoint.scalars, checkpoint.manifest.versions
    on = scalars.get("adapters")
    phase = f"adapters on, rank {_short(scalars.get('adapter_rank'))}" if on is True else "adapters off"
    dense = totals.trained - totals.pruned_kept - totals.adapters
    facts = {
        "checkpoint": str(checkpoint.path),
        "step": str(checkpoint.step),
        "phase": phase if isinstance(on, bool) else "not said",
        "written by": ", ".join(f"{_clip(name)} {_clip(version)}" for name, version in versions.items()) or "not said",
        "layout": _layout(checkpoint.config, totals.ranks),
        "scalars": _pairs(scalars),
        "files": ", ".join(
            f"{number} of {sort} ({size_text(size)})" for sort, (number, size) in sorted(totals.files.items())[::-1]
        ),
        "trained": f"{totals.trained:,} elements = {totals.pruned_kept:,} kept in pruned weights + "
        f"{totals.adapters:,} in adapters + {dense:,} dense; {totals.pruned_entries - totals.pruned_kept:,} pruned",
    }
    if totals.pruned_entries:
        size, dense = totals.pruned_optimizer_bytes, totals.dense_optimizer_bytes
        facts["pruned weights"] = (
            f"{size_text(totals.pruned_bytes)} with metadata; dense in bf16 "
            f"{_ratio(totals.pruned_bytes, totals.dense_bf16_bytes)}, dense in their own dtype "
            f"{_ratio(totals.pruned_bytes, totals.dense_bytes)}"
        )
        facts["their optimizer"] = f"{size_text(size)}; dense {_ratio(size, dense)}"
        facts["all optimizer"] = (
            f"{size_text(totals.optimizer_bytes)}; with those dense "
            f"{_ratio(totals.optimizer_bytes, totals.optimizer_bytes - size + dense)}"
        )
    else:
        facts["optimizer"] = size_text(totals.optimizer_bytes)
    return facts


def _ratio(part: int, whole: int) -> str:
    return f"{size_text(whole)} (x {part / whole:.4f})" if whole else size_text(whole)


def _layout(config: Mapping[str, Any], ranks: int) -> str:
    """The layout as far as the config says; it says no number of data ranks where the launcher decided it."""
    parallel = config.get("parallel")
    said = parallel if isinstance(parallel, Mapping) else {}
    parts = [
        f"{name.replace('_', ' ')} {_short(said[name]).strip(chr(34))}"
        for name in _LAYOUT_KEYS
        if said.get(name) is not None
    ]
    if "precision" in config:
        parts.append(f"precision {_short(config['precision']).strip(chr(34))}")
    return f"{', '.join(parts) or 'not said'}; files of {ranks} {'rank' if ranks == 1 else 'ranks'}"


_LAYOUT_KEYS = ("engine", "zero_stage", "tensor", "pipeline", "data", "sequence_parallel")


def _pairs(section: Mapping[str, Any]) -> str:
    """The values of a JSON object, "a 1, b.c 2", as many as are useful."""
    pairs: list[str] = []
    todo = list(section.items())
    while todo and len(pairs) < _MOST_SCALARS:
        name, value = todo.pop(0)
        if isinstance(value, Mapping) and value:
            todo = [(f"{_clip(name)}.{inner}", below) for inner, below in value.items()] + todo
        else:
            pairs.append(f"{_clip(name)} {_short(value)}")
    return ", ".join(pairs) + (", ..." if todo else "")


def _short(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return _clip(json.dumps(value, ensure_ascii=False))


def _path(path: tuple[str, ...]) -> str:
    return ".".join(map(_clip, path))


def _clip(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _layer_table(layers: list[LayerNumbers]) -> Table:
    masks = any(row.column_kept is not None for row in layers)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("shape", "stored", "dtype"):
        table.add_column(heading)
    for heading in ("kept", *(["column mask"] if masks else []), "zeros", "norm", "adapter"):
        table.add_column(heading, justify="right")
    for row in layers:
        rank = row.layer.adapter_rank
        table.add_row(
            row.layer.name,
            Text(str(list(row.layer.shape))),
            stored_as(row),
            row.dtype,
            _share(row.kept, row.entries),
            *([_share(row.column_kept, row.entries)] if masks else []),
            _share(row.zeros, row.stored_elements),
            f"{row.norm:.6g}",
            "" if rank is None else f"rank {rank}",
        )
    return table


def stored_as(row: LayerNumbers) -> str:
    """How a layer's weight is stored: "2:4" or another pattern, "dense", "unclear" where it does not fit together."""
    if row.layer.problem is not None:
        return "unclear"
    return "dense" if row.layer.pattern is None else str(row.layer.pattern)


def _share(part: int | None, whole: int) -> str:
    return "" if part is None or not whole else f"{100 * part / whole:.2f} %"


def report_json(checkpoint: Checkpoint, totals: Totals, layers: list[LayerNumbers]) -> dict[str, Any]:
    """`report` as JSON, with everything that the manifest says of the run."""
    manifest = checkpoint.manifest
    content: dict[str, Any] = {
        name: getattr(manifest, name) for name in ("format", "scalars", "identity", "config", "versions")
    }
    content["problems"] = _problems(checkpoint)
    content["totals"] = asdict(totals)
    content["layers"] = [
        {
            "name": row.layer.name,
            "shape": row.layer.shape,
            "stored": stored_as(row),
            "adapter_rank": row.layer.adapter_rank,
            **{name: value for name, value in vars(row).items() if name != "layer"},
        }
        for row in layers
    ]
    return content


def comparison(found: Differences) -> list[Line]:
    """What differs between two checkpoints."""
    lines: list[Line] = [
        f"{_path(field.path)}: {_short(field.there)} there, {_short(field.here)} here" for field in found.fields
    ]
    lines += [f"only here: {key}" for key in found.only_here]
    lines += [f"only there: {key}" for key in found.only_there]
    if found.equal:
        return [*lines, f"equal in every logical tensor ({found.compared})"]
    if found.tensors:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("tensor", overflow="fold")
        for heading in ("elements", "largest", "relative"):
            table.add_column(heading, justify="right")
        table.add_column("", overflow="fold")
        for row in found.tensors:
            numbers = ("" if number is None else f"{number:.3g}" for number in (row.largest, row.relative))
            table.add_row(row.key, f"{row.elements:,} of {row.of:,}", *numbers, Text(row.form))
        lines.append(table)
    return [*lines, f"{len(found.tensors)} of the {found.compared} logical tensors that both have differ"]


def comparison_json(found: Differences) -> dict[str, Any]:
    """`comparison` as JSON; of a field, a side that lacks it is left out."""
    fields = [
        {"path": field.path}
        | {side: value for side, value in (("there", field.there), ("here", field.here)) if value is not ABSENT}
        for field in found.fields
    ]
    return {
        "equal": found.equal,
        "fields": fields,
        "only_here": found.only_here,
        "only_there": found.only_there,
        "tensors": [row._asdict() for row in found.tensors],
        "compared": found.compared,
    }
