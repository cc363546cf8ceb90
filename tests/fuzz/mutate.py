"""Damages inputs: the same random numbers give the same damage.

Bytes are flipped, cut, copied and overwritten. JSON, also that in the header of safetensors, gets
other values in the places of its own, so that the damage comes past the parser.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

_DEEP = 5000  # more than Python's limit of recursion
_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_WRITTEN = ("-1", "1e999", "0.5", "9" * 400, "9" * 5000)
_WORDS = (b"", b"\0", b"\xff\xfe", b"\n", b"../", b"/etc/passwd", "\ud7ff\U0001f600".encode())
_NESTED = (b"[" * _DEEP, b'{"a":' * _DEEP)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, -(2**63), 1e308, 10**30, 10**400),
    *("", "a", "../../x", "/etc/passwd", "\0", "a\nb", "1", "nan", "x" * 3000, "<bos>", "int8"),
    *([], {}, [[]], [0], [-1], [None], {"": None}, {"a": {}}, [1, "a"], [2**40, 2**40], [0, 2**63]),
)
_NUMBER = re.compile(rb"\d+")


def mutate(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with one to four changes."""
    data = chance.choice(seeds)
    for _ in range(chance.choice((1, 1, 2, 4))):
        data = _changed(chance, data, seeds)
    return data


def _changed(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if chance.random() < 0.6 and (changed := _json_changed(chance, data)) is not None:
        return changed
    return chance.choice(_CHANGES)(chance, data, seeds)


def _json_changed(chance: random.Random, data: bytes) -> bytes | None:
    """With another value somewhere in its JSON; None if it has none."""
    if data[:1] in (b"{", b"["):
        return _value_changed(chance, data)
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or length > len(data) - 8:
        return None
    header = _value_changed(chance, data[8 : 8 + length])
    return header and len(header).to_bytes(8, "little") + header + data[8 + length :]


def _value_changed(chance: random.Random, data: bytes) -> bytes | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = list(_places(value))
    if not places:
        return None
    holder, key = chance.choice(places)
    kind = chance.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = chance.choice([each[at] for each, at in places])
    elif kind == 2 and isinstance(holder, dict):
        holder[str(chance.choice(_VALUES))[:40]] = holder.pop(key)
    else:
        holder[key] = chance.choice(_VALUES)
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a value was put into itself
        return None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found


def _flip(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if not data:
        return b"\0"
    at = _near_start(chance, len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _cut(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    return data[: _near_start(chance, len(data) + 1)]


def _without(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = _near_start(chance, len(data) + 1)
    return data[:at] + data[at + chance.choice((1, 2, 8, 64)) :]


def _copied(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    start, at = (_near_start(chance, len(data) + 1) for _ in range(2))
    return data[:at] + data[start : start + chance.choice((1, 4, 32, 256))] + data[at:]


def _number(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A whole number in binary, over what was there."""
    width = chance.choice((1, 2, 4, 8))
    number = chance.choice(_NUMBERS) & (1 << 8 * width) - 1
    at = _near_start(chance, len(data) + 1)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def _digits(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Another number in the place of one that is written with digits."""
    found = list(_NUMBER.finditer(data))
    if not found:
        return _flip(chance, data, seeds)
    match = chance.choice(found)
    written = chance.choice((*map(str, _NUMBERS), *_WRITTEN)).encode()
    return data[: match.start()] + written + data[match.end() :]


def _word(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = _near_start(chance, len(data) + 1)
    return data[:at] + chance.choice((*_WORDS, *_WORDS, *_NESTED)) + data[at:]


def _spliced(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = chance.choice(seeds)
    return data[: _near_start(chance, len(data) + 1)] + other[_near_start(chance, len(other) + 1) :]


def _near_start(chance: random.Random, length: int) -> int:
    """An index; half of them in the first kilobyte, where headers are."""
    return chance.randrange(min(length, 1024) if chance.random() < 0.5 else length)


_Change = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
_CHANGES: tuple[_Change, ...] = (
    *(_flip, _cut, _without, _copied, _number, _number, _digits, _word, _spliced),
)
