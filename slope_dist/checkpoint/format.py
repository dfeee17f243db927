"""What lies on disk: names, and the manifest with its checks. docs/checkpoint-format.md says it for strangers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from slope_dist.checkpoint.regions import check_tiling
from slope_dist.errors import UserError
from slope_dist.parallel.fragments import Kind

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**31

_MAX_DEPTH = 64
"""Of the JSON in it, which could nest deeper than Python's stack allows what walks through it."""
_MAX_DIMS = 16
_MAX_SIZE = 2**62
LATEST = "latest"

FILE_NAME = re.compile(r"rank-[0-9]{5,}\.(weights|optimizer)\.safetensors")
LEFTOVER_NAME = re.compile(r"step-[0-9]{8,}\.tmp-[0-9a-f]{32}|\.trash-step-[0-9]{8,}-[0-9a-f]{32}")
"""What an interrupted save or removal leaves behind."""
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_TENSOR_KEY = rf"^({'|'.join(get_args(Kind))})/[A-Za-z0-9._-]+$"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
"""safetensors' names of the dtypes a checkpoint may hold."""

_SHA256 = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n')
_SHA256_SIZE = len(',"sha256":""}\n') + 64
_MAX_TEXT = 1000


class CheckpointError(UserError):
    """A checkpoint that cannot be trusted or could not be written: folder, file, what was expected and what found."""

    def __init__(self, text: str) -> None:
        # The text may quote names out of a hostile file; whatever they hold, it stays one line of moderate length.
        super().__init__("".join(c if c.isprintable() else " " for c in text)[:_MAX_TEXT])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[StrictInt, Field(ge=0)]


class StoredFragment(_Strict):
    """Where one piece of a logical tensor lies: elements [start, stop) of `rectangle`, 1-D under `key` in `file`."""

    file: str
    key: str
    rectangle: tuple[tuple[Count, Count], ...]
    start: Count
    stop: Count


class StoredTensor(_Strict):
    """One state of one logical tensor: its global shape, its dtype and its pieces, which tile it."""

    shape: tuple[Count, ...]
    dtype: Literal["F64", "F32", "F16", "BF16", "U8"]
    fragments: tuple[StoredFragment, ...]


class StoredFile(_Strict):
    """Size and hash of one file."""

    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Strict):
    """Everything that is not the tensors' own bytes. Tensors are under "<kind>/<global name>"."""

    format: StrictInt
    step: Count
    scalars: dict[str, Any]
    identity: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[Annotated[str, Field(pattern=f"^{FILE_NAME.pattern}$")], StoredFile]
    tensors: Annotated[dict[Annotated[str, Field(pattern=_TENSOR_KEY)], StoredTensor], Field(min_length=1)]


def folder_name(step: int) -> str:
    """Name of the folder that holds the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint a folder of this name holds, None for every other name."""
    match = _STEP_NAME.fullmatch(name)
    step = int(match[1]) if match and len(match[1]) < 20 else None
    return step if step is not None and folder_name(step) == name else None


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype.

    Raises:
        ValueError: if checkpoints do not hold such tensors.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"tensors of {dtype} are not saved; {', '.join(DTYPES)} are")


def encode(content: dict[str, Any]) -> bytes:
    """The file of `content` (of a manifest, the fields of `Manifest`): JSON whose last member is the SHA-256 of all
    bytes before it.

    Raises:
        TypeError, ValueError: if something in it is not JSON.
    """
    body = _json(content).encode()[:-1]
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def _json(value: Any, levels: int = 2) -> str:
    """The JSON of a value; its upper levels member by member, since the library lets no other thread run meanwhile."""
    if levels and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return f"{{{','.join(f'{json.dumps(name)}:{_json(member, levels - 1)}' for name, member in value.items())}}}"
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def unseal(data: bytes) -> Any:
    """Undo `encode` as far as JSON goes: what was sealed, without the seal.

    Raises:
        ValueError: what was expected and what found, in one line.
    """
    body, ending = data[:-_SHA256_SIZE], _SHA256.fullmatch(data[-_SHA256_SIZE:])
    if ending is None:
        raise ValueError(f"expected its own sha256 at its end, found {data[-_SHA256_SIZE:]!r}")
    stored, found = ending[1].decode(), hashlib.sha256(body).hexdigest()
    if stored != found:
        raise ValueError(f"expected sha256 {stored}, found {found}")
    try:
        return json.loads(body + b"}", object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("expected JSON of moderate depth, found deeper nesting") from None
    except ValueError as error:
        raise ValueError(f"expected JSON: {error}") from None


def decode(data: bytes) -> Manifest:
    """Undo `encode`, believing nothing.

    Raises:
        ValueError: what was expected and what found, in one line.
    """
    manifest = _typed(unseal(data))
    _check_moderate(manifest)
    _check_pieces(manifest.files, manifest.tensors.items())
    return manifest


def check_content(content: dict[str, Any]) -> None:
    """Refuse what `decode` would refuse of `encode(content)`, tensor by tensor, so that other threads run meanwhile.

    json and pydantic let none run: the pieces of a thousand ranks take them a minute.

    Args:
        content: the fields of `Manifest`.

    Raises:
        ValueError: as `decode`.
    """
    tensors = content["tensors"]
    bare = _typed(unseal(encode(content | {"tensors": {key: tensors[key] | {"fragments": []} for key in tensors}})))
    _check_moderate(bare)
    # One at a time, and none is kept: the collector of garbage would walk through all of them, and let none run either.
    _check_pieces(bare.files, ((key, _validated(StoredTensor, tensors[key], "tensors", key)) for key in tensors))


def _typed(content: Any) -> Manifest:
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"expected format {FORMAT_VERSION}, found {version!r:.80}")
    return _validated(Manifest, content)


_Model = TypeVar("_Model", bound=BaseModel)


def _validated(model: type[_Model], content: Any, *where: str) -> _Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, (*where, *first['loc'])))}: {first['msg']}") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON's")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def _check_moderate(manifest: Manifest) -> None:
    """Refuse what no run writes, and what walks through it or adds it up could not take."""
    level: list[Any] = [manifest.scalars, manifest.identity, manifest.config]
    for _ in range(_MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [value for values in inner for value in values]
    if level:
        raise ValueError(f"expected at most {_MAX_DEPTH} levels, found more")
    for key, tensor in manifest.tensors.items():
        if len(tensor.shape) > _MAX_DIMS or any(size > _MAX_SIZE for size in tensor.shape):
            raise ValueError(f"{key}: expected a shape of moderate size, found another")


def _check_pieces(files: Mapping[str, StoredFile], tensors: Iterable[tuple[str, StoredTensor]]) -> None:
    """Refuse fragments that name no listed file, share a place, do not tile their tensor or do not fit their file; and
    unused files."""
    places = set()
    sizes = dict.fromkeys(files, 0)
    for name, tensor in tensors:
        try:
            check_tiling(tensor.shape, ((part.rectangle, part.start, part.stop) for part in tensor.fragments))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for part in tensor.fragments:
            if part.file not in files:
                raise ValueError(f"{name}: a fragment lies in {part.file!r}, which is not among the files")
            if (part.file, part.key) in places:
                raise ValueError(f"{name}: {part.key!r} of {part.file} is used twice")
            places.add((part.file, part.key))
            sizes[part.file] += (part.stop - part.start) * DTYPES[tensor.dtype].itemsize
    unused = sorted(files.keys() - {file for file, _ in places})
    if unused:
        raise ValueError(f"no tensor has a fragment in {unused[0]}")
    for file, size in sizes.items():
        if size > files[file].bytes:
            raise ValueError(f"{file}: expected at least its tensors' {size} bytes, found {files[file].bytes}")
