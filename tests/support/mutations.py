"""Mutated files: bytes flipped, cut, duplicated or inserted, and JSON trees with other content.

Everything is determined by a seed, so that failures are reproducible.
"""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

BLOBS = [
    b"\x00", b"\x00" * 64, b"\xff" * 9, b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\r", b"\n\n",
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"#", b"=", b"//", b"'''", b"null", b"NaN", b"-Infinity",
    b"1e999", b"9" * 5000, b"-" + b"9" * 400, b"[" * 3000, b'{"a":' * 3000, b"a." * 3000, b'"\\ud800"',
    b"x" * 100_000, b"\x80\x02", b"PK\x03\x04", b"PK\x05\x06", b"!!python/object", b"1979-05-27",
]  # fmt: skip

OTHERS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**30, -(10**400), 0.5, -2.5, 1e300, float("nan"), float("inf"),
    "", "0", "w4a4", "a\nb\x1b[0m", "x" * 5000, "\0", "../../etc/passwd", "/etc/passwd", "~nobody/x", "é Ω 名",
    "1" * 5000, [], [1], [[[[[[1]]]]]], [1] * 3000, {}, {"a": 1}, {"": {"": {"": {}}}},
]  # fmt: skip


def bytes_of(raw: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` files that differ from ``raw`` by one to four byte mutations."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = raw
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            changed = _one(changed, rng)
        yield changed


def _one(raw: bytes, rng: random.Random) -> bytes:
    if not raw:
        return rng.choice(BLOBS)
    here = rng.randrange(len(raw))
    there = min(len(raw), here + rng.choice([1, 2, 8, 64, len(raw)]))
    kind = rng.randrange(7)
    if kind == 0:
        return raw[:here] + bytes([raw[here] ^ 1 << rng.randrange(8)]) + raw[here + 1 :]
    if kind == 1:
        return raw[:here]
    if kind == 2:
        return raw[:here] + raw[there:]
    if kind == 3:
        return raw[:here] + rng.choice(BLOBS) + raw[here:]
    if kind == 4:
        return raw[:there] + raw[here:there] * rng.choice([1, 2, 20]) + raw[there:]
    if kind == 5:
        return (
            raw[:here]
            + bytes(rng.randrange(256) for _ in range(there - here if there - here < 65 else 4))
            + raw[there:]
        )
    return raw[:here] + rng.choice(BLOBS) + raw[min(len(raw), here + 4) :]


def trees_of(tree: Any, count: int, seed: int = 0) -> Iterator[Any]:
    """``count`` trees that differ from ``tree`` at one to three nodes: other value, removed, or other key."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(tree)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            places = list(_places(changed))
            if not places:
                break
            holder, key = rng.choice(places)
            kind = rng.randrange(4)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[rng.choice(["surprise", "", "a\nb", "x" * 3000, "__class__", "schema_version"])] = (
                    holder.pop(key)
                )
            else:
                holder[key] = copy.deepcopy(rng.choice(OTHERS))
        yield changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every node of a tree except its root: its container and key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def texts_of(tree: Any, count: int, seed: int = 0) -> Iterator[bytes]:
    """``tree`` as JSON, ``count`` times mutated: half of them as trees, half as bytes."""
    for changed in trees_of(tree, count // 2, seed):
        yield json.dumps(changed, ensure_ascii=False).encode("utf-8", "surrogatepass")
    yield from bytes_of(json.dumps(tree, indent=1).encode(), count - count // 2, seed)
