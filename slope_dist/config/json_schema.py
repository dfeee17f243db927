"""A run's JSON schema for editors, generated: `python -m slope_dist.config.json_schema > docs/config.schema.json`.

It knows keys, types, ranges and defaults. What must hold between keys (a batch size and the ranks it is divided over)
only `load_config` checks.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from slope_dist.config.fields import Section
from slope_dist.config.schema import Config

_DESCRIPTION = "A run of slope_dist; docs/config.md is the same as a page."
_NAMING_KEY = {"description": "Where this schema lies, for editors; a run does not read it.", "type": "string"}


class _Untitled(GenerateJsonSchema):
    """Without the titles that pydantic makes of keys, which editors would show in place of the descriptions."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No field has one."""
        return False


def schema() -> dict[str, Any]:
    """Return the schema, of JSON Schema's draft 2020-12."""
    made = Config.model_json_schema(schema_generator=_Untitled)
    for section in [made, *made["$defs"].values()]:
        del section["title"]
    for name, field in Config.model_fields.items():
        kind = field.annotation
        # Sections whose keys all have defaults may be left out; an editor shows what is then meant.
        if isinstance(kind, type) and issubclass(kind, Section) and not field.is_required():
            made["properties"][name]["default"] = kind().model_dump(mode="json")
    properties = {"$schema": _NAMING_KEY, **made["properties"]}
    return {"$schema": GenerateJsonSchema.schema_dialect, **made, "description": _DESCRIPTION, "properties": properties}


def render() -> str:
    """Return the schema as the text of its file."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(render(), end="")
