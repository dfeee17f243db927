"""Rule R4: model files know no collectives, no ranks and no sparsity; rooms import downwards only.

Names are read from the syntax tree, so that a docstring may say what the code must not.

Run: pytest tests/models/test_rule_r4.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import slope_dist

PACKAGE = Path(slope_dist.__file__).parent
FORBIDDEN = re.compile(
    r"(^|_)(distributed|rank|ranks|world|group|collective|all_reduce|all_gather|reduce_scatter|broadcast|mpu|deepspeed"
    r"|fsdp|megatron|sparse|sparsity|pattern|indices|mask|prune|pruned|shard|tensor_parallel)($|_)",
    re.IGNORECASE,
)
ALLOWED_ROOMS = {
    "sparse": {"errors", "sparse"},
    "watching": {"errors", "lines", "watching"},
    "parallel": {"errors", "lines", "output", "watching", "parallel"},
    "layers": {"errors", "sparse", "parallel", "layers"},
    "models": {"errors", "layers", "models"},
}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def identifiers(tree: ast.AST) -> Iterator[str]:
    yield from (part for module in imported_modules(tree) for part in module.split("."))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def files(room: str) -> list[Path]:
    found = sorted((PACKAGE / room).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("models"), ids=lambda path: path.name)
def test_a_model_file_does_not_know_where_it_runs(path: Path) -> None:
    names = set(identifiers(ast.parse(path.read_text())))
    assert not {name for name in names if FORBIDDEN.search(name)}


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as d",
        "from slope_dist.sparse import Pattern",
        "f(rank=0)",
        "x.world_size",
        "a_rank = 1",
    ],
)
def test_the_check_sees_what_it_forbids(line: str) -> None:
    assert any(FORBIDDEN.search(name) for name in identifiers(ast.parse(line)))


@pytest.mark.parametrize("room", ALLOWED_ROOMS)
def test_a_room_imports_downwards_only(room: str) -> None:
    for path in files(room):
        for module in imported_modules(ast.parse(path.read_text())):
            package, _, rest = module.partition(".")
            if package == "slope_dist":
                assert rest.split(".")[0] in ALLOWED_ROOMS[room], f"{path.name} imports {module}"
