"""docs/config.md is what the schema says, and lists every key.

Run alone: pytest tests/config/test_reference.py
"""

from pathlib import Path

from slope_dist.config.messages import field_paths
from slope_dist.config.reference import render
from slope_dist.config.sections import AlternativeConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text() == render(), "run: python -m slope_dist.config.reference > docs/config.md"


def test_every_key_has_a_row():
    rows = [line.split("`")[1] for line in render().splitlines() if line.startswith("| `")]
    assert sorted(row for row in rows if "[]" not in row) == sorted(field_paths())
    inner = [row.removeprefix("parallel.alternatives[].") for row in rows if "[]" in row]
    assert inner == list(AlternativeConfig.model_fields)
