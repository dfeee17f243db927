"""A small valid run as a dictionary, and the way to load one from a file and to read its refusal."""

import json
from pathlib import Path

import pytest

from slope_dist.config import load_config
from slope_dist.errors import UserError


@pytest.fixture
def minimal():
    return {
        "model": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "ffn_size": 256,
            "vocab_size": 512,
            "sequence_length": 32,
        },
        "data": {"folder": "data/text"},
        "training": {"steps": 100, "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
    }


@pytest.fixture
def load(tmp_path):
    """Load a dictionary, text or bytes as the file run.json."""

    def load(content, overrides=()):
        path = tmp_path / "run.json"
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_config(path, overrides)

    return load


@pytest.fixture
def refusal(load):
    """Return what follows the file's name in the one-line refusal of a content."""

    def refusal(content, overrides=()):
        with pytest.raises(UserError) as caught:
            load(content, overrides)
        message = str(caught.value)
        assert message.isprintable(), f"not one clean line: {message!r}"
        path, _, rest = message.partition(": ")
        assert Path(path).name == "run.json"
        return rest

    return refusal
