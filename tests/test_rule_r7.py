"""Rule R7: nothing of the program pickles, writes pickles or reads them, nor asks a library to.

Names are read from the syntax tree, so that a docstring may say what the code must not.

Run: pytest tests/test_rule_r7.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULE = re.compile(r"(pickle|cPickle|_pickle|dill|cloudpickle|joblib|shelve|marshal|torch\.package)(\.|$)")
PICKLING = {"torch.load", "torch.save", "np.load", "numpy.load", "torch.jit.load"}
"""Functions that pickle or may be made to."""
RIVALS = ROOT / "tools" / "checkpoint_rivals.py"
"""Measures other libraries' own checkpoints beside ours, and reads back what it has just written; no part of a run."""
METHOD = re.compile(r"\w+_object(_list|s)?$|save_checkpoint|load_checkpoint|save_16bit_model|load_module_state_dict")
"""torch.distributed's collectives on objects, and DeepSpeed's own checkpoints."""


def pickling(text: str) -> Iterator[str]:
    """What in a program pickles, as line: name."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if MODULE.match(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                name
                for name in full
                if MODULE.match(name) or name in PICKLING or METHOD.fullmatch(name.rpartition(".")[2])
            ]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in PICKLING or ("." in called and METHOD.fullmatch(called.rpartition(".")[2])):
                names = [called]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = ["allow_pickle"]
        yield from (f"{getattr(node, 'lineno', '?')}: {name}" for name in names)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import joblib.numpy_pickle as j",
        "from torch import load",
        "from torch.distributed import all_gather_object",
        "torch.save({}, 'a.pt')",
        "dist.broadcast_object_list(found)",
        "engine.save_checkpoint('folder')",
        "np.fromfile(path, allow_pickle=True)",
    ],
)
def test_it_would_be_found(text: str) -> None:
    assert list(pickling(text))


def test_nothing_pickles() -> None:
    files = [path for folder in ("slope_dist", "launch", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
    files.remove(RIVALS)
    assert len(files) > 90
    assert not any("checkpoint_rivals" in path.read_text() for path in files if path.parent.name != "tools")
    found = [f"{path.relative_to(ROOT)}:{place}" for path in files for place in pickling(path.read_text())]
    assert not found, found
