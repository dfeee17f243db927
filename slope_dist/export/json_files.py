"""The JSON files by which a form is known, read as something that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path

from slope_dist.errors import UserError
from slope_dist.files import read_bounded

CONFIG = "config.json"
"""Of Hugging Face's forms, and of those like them."""

SLOPE = "slope.json"
"""Of our own."""

MAX_JSON_BYTES = 2**26


def read_json(path: Path) -> dict[str, object]:
    """A JSON object of a moderate size.

    Raises:
        UserError: if it cannot be read or is none.
    """
    try:
        content = json.loads(read_bounded(path, MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
