"""Random changes of JSON and of bytes: small ones, which get past the first checks, and absurd values."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

_MARKS = {
    "\x01deep": b"[" * 3000 + b"]" * 3000,
    "\x01open": b'{"a":' * 3000,
    "\x01digits": b"9" * 6000,
    "\x01exponent": b"1e999999",
    "\x01latin": b'"\xe9"',
    "\x01surrogate": b'"\\udc80"',
    "\x01comment": b"/**/",
}
"""Stand-ins for what Python's JSON writer would not write."""

_TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"-",
    b"0",
    b"9",
    b"e9",
    b".5",
    b"null",
    b"true",
    b"NaN",
    b"\\u0000",
)


class _Twice(dict[str, Any]):
    """Writes its first member twice."""

    def items(self) -> Any:
        pairs = list(super().items())
        return pairs[:1] + pairs


def absurd(draw: random.Random) -> Any:
    """A value that hardly belongs anywhere."""
    return draw.choice(
        [
            *(
                None,
                True,
                False,
                0,
                1,
                -1,
                2,
                7,
                1.0,
                1.5,
                -0.0,
                1e308,
                float("nan"),
                float("inf"),
                "",
                "a",
                "\0",
                "..",
                "/",
            ),
            *(2**31, 2**32 + 1, 2**53 + 1, 2**62, 2**63, 2**64, 10**30, -(2**63), [], {}, [[]], [{}], {"": 0}),
            *(
                "x" * 5000,
                "\u0661",
                "\u2028",
                "__proto__",
                "../a",
                "weight/a",
                "F32",
                "I8",
                [0, 1],
                [[0, 4]],
                [1] * 100,
            ),
            *_MARKS,
        ]
    )


def write(tree: Any) -> bytes:
    """A tree as JSON text, with what stands for text that no writer writes."""
    text = json.dumps(tree, separators=(",", ":")).encode()
    for mark, stands_for in _MARKS.items():
        text = text.replace(json.dumps(mark).encode(), stands_for)
    return text


def mutate_tree(tree: Any, draw: random.Random) -> Any:
    """Change a tree in one random place, in place; returns the tree, which may be another."""
    places = list(_places(tree))
    if not places:
        return absurd(draw)
    parent, key = draw.choice(places)
    change: Callable[[], Any] = draw.choice(
        [
            lambda: parent.__setitem__(key, absurd(draw)),
            lambda: parent.__delitem__(key),
            lambda: parent.__setitem__(key, _near(parent[key], draw)),
            lambda: parent.__setitem__(key, _near(parent[key], draw)),
            lambda: _exchange((parent, key), draw.choice(places)),
            lambda: _copy((parent, key), draw.choice(places)),
            lambda: _grow(parent, key, draw),
            lambda: _rename(parent, key, draw),
        ]
    )
    change()
    if draw.random() < 0.02:
        twice = [(parent, key) for parent, key in _places(tree) if type(parent[key]) is dict and parent[key]]
        if twice:
            parent, key = draw.choice(twice)
            parent[key] = _Twice(parent[key])
    return tree


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change bytes in one random place."""
    at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    end = min(end, at + draw.choice((1, 1, 2, 8, 64, len(data))))
    part = data[at:end]
    return draw.choice(
        [
            data[:at] + bytes(byte ^ 1 << draw.randrange(8) for byte in part[:1]) + data[at + 1 :],
            data[:at] + draw.randbytes(len(part)) + data[end:],
            data[:at] + data[end:],
            data[:end] + part + data[end:],
            data[:at] + draw.choice(_TOKENS) + data[at:],
            data[:at] + draw.choice(_TOKENS) + data[end:],
            data[:at],
        ]
    )


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of everything below the root."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                yield node, key
                waiting.append(node[key])


def _near(value: Any, draw: random.Random) -> Any:
    """Something like `value`."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return draw.choice([value + 1, value - 1, value + 8, value * 2, -value, str(value), value / 2, [value]])
    if isinstance(value, str) and value:
        at = draw.randrange(len(value))
        return draw.choice(
            [value[:at] + chr(draw.randrange(1, 0x500)) + value[at + 1 :], value[:at], value + value[at:]]
        )
    if isinstance(value, list) and value:
        return draw.choice([value[::-1], value + value[:1], value[1:], value[:1]])
    if isinstance(value, dict) and value:
        return dict(draw.sample(list(value.items()), len(value) - 1))
    return absurd(draw)


def _exchange(first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
    (a, i), (b, j) = first, second
    # By way of text, or a node could come to hold itself.
    one, other = json.dumps(a[i]), json.dumps(b[j])
    a[i] = json.loads(other)
    b[j] = json.loads(one)


def _copy(target: tuple[Any, Any], source: tuple[Any, Any]) -> None:
    target[0][target[1]] = json.loads(json.dumps(source[0][source[1]]))


def _grow(parent: Any, key: Any, draw: random.Random) -> None:
    value = json.loads(json.dumps(parent[key]))
    if isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), value)
    else:
        parent[draw.choice([f"{key}x", "sha256", "", "\x02", key[:-1]])] = value


def _rename(parent: Any, key: Any, draw: random.Random) -> None:
    if isinstance(parent, dict):
        parent[str(_near(key, draw))] = parent.pop(key)
    else:
        draw.shuffle(parent)
