"""What the sections of a config are made of: their base, and numbers within sensible limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Cuts, metadata bytes and initialisation blocks all lie on multiples of 8 in both dimensions (rule R3).
DIMENSION_MULTIPLE = 8


def _usable_path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must be a path: not empty, no NUL character")
    return text


# Upper limits keep an absurd value, most often a slip of the finger, from hanging or crashing what counts and allocates
# by it; no real run comes near them.
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Samples = Annotated[int, Field(ge=1, le=2**20)]
Ranks = Annotated[int, Field(ge=1, le=2**20)]
Threads = Annotated[int, Field(ge=1, le=4096)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=1e30)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=1e30)]
PathText = Annotated[
    str, Field(min_length=1, max_length=4096, json_schema_extra={"pattern": r"\S"}), AfterValidator(_usable_path)
]


class Section(BaseModel):
    """Base of every section: strict types, no unknown keys, no change after loading, no NaN or infinity."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def neighbours(size: int, multiple: int) -> tuple[int, int]:
    """The multiples nearest to `size` that a user may write, below and above."""
    below = size - size % multiple
    return max(below, multiple), below + multiple
