"""The manifest of a corpus, read as something that anybody may have written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from slope_dist.data.index import AGAIN
from slope_dist.data.jobs import SPLITS
from slope_dist.data.prepare import FORMAT
from slope_dist.errors import UserError
from slope_dist.files import read_bounded

# The names and hashes of millions of inputs.
_MAX_MANIFEST_BYTES = 2**29


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of what the manifest states of tokenizer and tokens."""
    identity = {
        "tokenizer": manifest["tokenizer_sha256"],
        "tokens": {name: entry["bin_sha256"] for name, entry in manifest["splits"].items()},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


_MANIFEST_TYPES = {
    "format": int,
    "vocab_size": int,
    "dtype": str,
    "tokenizer_sha256": str,
    "source": dict,
    "valid_fraction": float,
    "seed": int,
    "splits": dict,
}
_SPLIT_TYPES = {
    "documents": int,
    "tokens": int,
    "text_bytes": int,
    "max_id": int,
    "bin_bytes": int,
    "idx_bytes": int,
    "bin_sha256": str,
    "idx_sha256": str,
}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, with the types of all that is used checked; None where there is none.

    Raises:
        UserError: it cannot be read, or is none.
    """
    if not path.exists():
        return None
    try:
        manifest = json.loads(read_bounded(path, _MAX_MANIFEST_BYTES).decode())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: damaged; {AGAIN}") from error
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')!r}; this program reads {FORMAT}; {AGAIN}")
    if not _has_types(manifest, _MANIFEST_TYPES):
        raise UserError(f"{path} is not a corpus manifest: damaged; {AGAIN}")
    for split, entry in manifest["splits"].items():
        if split not in SPLITS or not _has_types(entry, _SPLIT_TYPES):
            raise UserError(f"{path} describes split {split!r} incompletely: damaged; {AGAIN}")
    return manifest


def _has_types(value: object, types: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(type(value.get(key)) is expected for key, expected in types.items())
