"""The config's section on data: one corpus, or several with weights."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from slope_dist.config.fields import PathText, Section
from slope_dist.config.weights import MOST_PLACES, period

MOST_CORPORA = 100


class CorpusPart(NamedTuple):
    """A corpus that a run reads, and its weight among the others."""

    name: str
    folder: str
    weight: Fraction


def _mixture_entry(text: str) -> str:
    folder, _, weight = text.rpartition("=")
    if Path(folder).name in ("", "..") or "\0" in folder or not _WEIGHT.fullmatch(weight) or Fraction(weight) == 0:
        raise ValueError(
            'must be "FOLDER=WEIGHT", a folder that ends in a name and a weight above 0, such as "data/code=0.3" or '
            '"data/code=1/3"'
        )
    return text


_WEIGHT = re.compile(r"\d{1,18}(\.\d{1,18}|/0*[1-9]\d{0,17})?", re.ASCII)
# What an editor can tell of an entry, in the regular expressions that JSON Schema and Python share.
_ENTRY = r"[\s\S]=[0-9]{1,18}(\.[0-9]{1,18}|/0*[1-9][0-9]{0,17})?$"
MixtureEntry = Annotated[
    str, Field(max_length=4096, json_schema_extra={"pattern": _ENTRY}), AfterValidator(_mixture_entry)
]


class DataConfig(Section):
    """The corpus and its tokenizer."""

    folder: PathText | None = Field(
        default=None,
        description="Folder of the prepared corpus; or what the names of a .bin and an .idx file of Megatron-LM's "
        "preprocessing begin with. null: see `mixture`.",
    )
    mixture: tuple[MixtureEntry, ...] = Field(
        default=(),
        strict=False,
        max_length=MOST_CORPORA,
        description='Several corpora in place of one `folder`: "FOLDER=WEIGHT", where the weights say in which parts '
        'samples are taken, in any unit ("data/code=0.3", "data/web=0.7"). Corpora go by the last part of their path.',
    )
    source: Literal["python-stdlib"] | None = Field(
        default=None,
        description="What to prepare into `folder` at first use where it is absent; null: never prepare.",
    )
    valid_fraction: float = Field(
        default=0.02,
        gt=0.0,
        lt=1.0,
        description="Share of the documents set apart for validation when preparing; of a pair of files of "
        "Megatron-LM's it is the last documents.",
    )
    tokenizer: PathText | None = Field(
        default=None,
        description="Tokenizer to prepare with, or that of a corpus made elsewhere: a SentencePiece model, a "
        "tokenizer.json, or a folder that holds one of them or GPT-2's vocab.json and merges.txt; null: train one of "
        "`model.vocab_size` pieces.",
    )

    @property
    def corpora(self) -> list[CorpusPart]:
        """All corpora, in order of name."""
        if self.folder is not None:
            return [CorpusPart(Path(self.folder).name, self.folder, Fraction(1))]
        entries = [entry.rpartition("=") for entry in self.mixture]
        return sorted(CorpusPart(Path(folder).name, folder, Fraction(weight)) for folder, _, weight in entries)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.folder is None and not self.mixture:
            raise ValueError("data.folder is required: folder of the prepared corpus; or data.mixture, of several")
        if self.folder is None and self.source is not None:
            raise ValueError(f'data.source "{self.source}" needs data.folder to prepare into, not data.mixture')
        if self.mixture and self.folder is not None:
            raise ValueError("data.folder and data.mixture are both given; keep one of them")
        if self.mixture:
            self._check_mixture()
        return self

    def _check_mixture(self) -> None:
        names = [part.name for part in self.corpora]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f'data.mixture has two corpora called "{twice}"; they go by the last part of their path, so rename one'
            )
        places = period([part.weight for part in self.corpora])
        if places > MOST_PLACES:
            raise ValueError(
                f"data.mixture: samples would repeat their order of corpora after {places} only, and {MOST_PLACES} "
                "is the most; round the weights, such as to 0.123"
            )
