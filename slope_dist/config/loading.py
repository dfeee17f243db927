"""Reading a run's JSON file strictly: whatever is wrong with it is told in one line, with what would be right.

`load_config` is the only way in for a user's file and `--set` overrides; `dump_config` writes what it returns, with
every default filled in, so that the written file loads to the same run.

The one key that is no part of the run is "$schema" at the top, by which a file names docs/config.schema.json for
editors; it is checked to be a string, and dropped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slope_dist.config.messages import close_names, explain, field_at, shown, unknown_key
from slope_dist.config.schema import Config
from slope_dist.errors import UserError

# A run's file is a few kilobytes, three levels deep; the limits keep a wrong file from costing time or the stack.
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_DIGITS = 40
_MAX_MESSAGE = 1000
_SCHEMA_KEY = "$schema"
_TOO_DEEP = f"is nested more than {_MAX_DEPTH} levels deep; sections are objects of plain values"


class _RefusedError(ValueError):
    """Something that Python's JSON reader accepts and we do not."""


class _Object(dict[str, Any]):
    """A JSON object that remembers the keys it was given twice."""

    repeated: tuple[str, ...] = ()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read the run described by the JSON file `path`, changed by `overrides`.

    An override is "section.key=value" (or "precision=value"); the value is read as JSON and, where it is none,
    taken as a plain string. `run.folder` is "runs/<file name without suffix>" where neither gives one.

    Raises `UserError`, in one line that starts with the file's name if it has one, on anything wrong: an unreadable
    file, text that is not JSON, unknown, duplicate, missing, mistyped or out-of-range keys, impossible combinations.
    """
    if not str(path):
        raise UserError("the config's name is empty; give the JSON file of a run (a shell variable may not be set)")
    try:
        tree = _parse(_read(Path(path)))
        if not isinstance(tree, dict):
            raise _RefusedError(f"holds {shown(tree)}, where a JSON object with the run's sections is expected")
        _check_tree(tree, "", 0)
        _drop_schema(tree)
        overridden = _apply(tree, overrides)
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(f"{path}: {explain(error, overridden)}")) from None
    except _RefusedError as error:
        raise UserError(_one_line(f"{path}: {error}")) from error.__cause__
    if config.run.folder is None:
        run = config.run.model_copy(update={"folder": f"runs/{Path(path).stem}"})
        config = config.model_copy(update={"run": run})
    return config


def dump_config(config: Config) -> str:
    """Return `config` as indented JSON with every field written; `load_config` reads it to an equal config."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise _RefusedError(f"there is no such file{_similar_file(path)}") from error
    except IsADirectoryError:
        raise _RefusedError("is a folder; give the JSON file of a run") from None
    except (OSError, ValueError) as error:
        raise _RefusedError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > _MAX_BYTES:
        raise _RefusedError(f"is larger than {_MAX_BYTES} bytes; a run's file is a few kilobytes of JSON")
    if not raw.strip():
        raise _RefusedError("is empty; a JSON object with the run's sections is expected")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark the reported position is three bytes short, which never moves it to another line.
        line = raw.count(b"\n", 0, error.start) + 1
        raise _RefusedError(f"line {line}: not UTF-8 text: {error.reason}") from None


def _similar_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.glob("*.json")]
    except OSError:
        return ""
    near = close_names(path.name, names)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _parse(text: str) -> Any:
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        raise _RefusedError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_parse_int)
    except RecursionError:
        raise _RefusedError(_TOO_DEEP) from None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        result.repeated = tuple(key for key, count in counts.items() if count > 1)
    return result


def _refuse_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not JSON; numbers must be finite")


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _RefusedError(f"a number of {len(digits)} digits ({digits[:12]}...) is out of every range")
    return int(digits)


def _check_tree(value: Any, path: str, depth: int) -> None:
    """Refuse duplicate keys, naming their JSON path, half characters and absurd depth."""
    if depth > _MAX_DEPTH:
        raise _RefusedError(_TOO_DEEP)
    prefix = f"{path}." if path else ""
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, _Object):
        if value.repeated:
            raise _RefusedError(f"{prefix}{value.repeated[0]}: the key is given twice; keep one of them")
        for key, inner in value.items():
            _check_text(key, path or "the run")
            _check_tree(inner, prefix + key, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_tree(inner, f"{path}[{index}]", depth + 1)


def _check_text(text: str, path: str) -> None:
    # A \ud800 escape in JSON can spell half of a character pair, which no file or terminal can hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _RefusedError(f"{path}: holds half of a surrogate pair, which is not text: {text[:40]!r}")


def _drop_schema(tree: dict[str, Any]) -> None:
    named = tree.pop(_SCHEMA_KEY, "")
    if not isinstance(named, str):
        raise _RefusedError(
            f"{_SCHEMA_KEY}: must be a string, the path or address of a JSON schema, not {shown(named)}"
        )


def _apply(tree: dict[str, Any], overrides: Iterable[str]) -> set[str]:
    """Write the overrides into `tree` and return their dotted paths."""
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise _RefusedError(f'--set "{override}": write section.key=value, such as training.steps=100')
        names = key.split(".")
        field = field_at(names)
        if field is None:
            raise _RefusedError(f"--set {unknown_key(names)}")
        if isinstance(field, type):
            raise _RefusedError(f"--set {key}: names a section; set one of its keys, as {key}.<key>=value")
        if key in seen:
            raise _RefusedError(f"--set {key}: is given twice; keep one of them")
        seen.add(key)
        section = tree if len(names) == 1 else tree.setdefault(names[0], {})
        # A section that is not an object is refused with its own message by the validation that follows.
        if isinstance(section, dict):
            section[names[-1]] = _value(text, key)
    return seen


def _value(text: str, key: str) -> Any:
    try:
        value = _loads(text)
    except json.JSONDecodeError:
        value = text
    except _RefusedError as error:
        raise _RefusedError(f"--set {key}: {error}") from None
    _check_tree(value, f"--set {key}", 0)
    return value


def _one_line(text: str) -> str:
    """Escape what would break the line or the terminal, and cut what would fill it."""
    if len(text) > _MAX_MESSAGE:
        text = text[: _MAX_MESSAGE - 3] + "..."
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", _escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
