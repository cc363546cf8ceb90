"""What one rendering of a chat template may take: steps, characters, nesting and time.

Python can't interrupt a method of a string, so what its result will be is computed before the call.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

LENGTH = 1_000_000  # characters of a text or items of a list, final or intermediate
_STEPS = 100_000  # loop iterations, range items, calls of functions and filters
_WORK = 50_000_000  # characters and items of all texts and lists that are made
_SECONDS = 10.0  # of the processor
_DEPTH = 100  # of lists in lists
_BITS = 64  # of an integer
_PRECISION = 300  # decimal places
_INDENT = 16
_LONGEST_INTEGER = 4096  # bits, of what isn't a product or power
# A format that takes widths from its arguments.
_SPECS = re.compile(r"%(\([^()]*\))?[-+ #0-9.]*\*|\{[^{}]*:[^{}]*\{")


class Budget:
    """Counts what a rendering has taken. Every method raises SecurityError above a limit."""

    def __init__(self) -> None:
        self._steps = self._work = 0
        self._end = time.thread_time() + _SECONDS

    def count(self, steps: int = 1) -> bool:
        """Count steps. Returns True."""
        self._steps += steps
        if self._steps > _STEPS:
            raise SecurityError(f"it takes more than {_STEPS} steps")
        return self.tick()

    def tick(self) -> bool:
        """Look at the time. Returns True."""
        if time.thread_time() > self._end:
            raise SecurityError(f"it takes more than {_SECONDS:g} seconds")
        return True

    def made(self, value: Any) -> Any:
        """The value, after its size was counted."""
        if isinstance(value, str | bytes | list | tuple | dict | set):
            self._work += check_length(measure(value))
            if self._work > _WORK:
                raise SecurityError(f"it makes texts and lists of more than {_WORK} in all")
        elif isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
            raise SecurityError(f"it makes a number of more than {_LONGEST_INTEGER} bits")
        return value


def measure(value: object) -> int:
    """Characters and items of a value, lists in lists again and again; at most LENGTH + 1.

    A list that holds another twice counts it twice: so does every text that is made of it.
    """
    total, waiting = 0, [(value, 0)]
    while waiting and total <= LENGTH:
        one, depth = waiting.pop()
        total += length(one) if isinstance(one, str | bytes) else 1
        if depth > _DEPTH:
            raise SecurityError(f"it nests lists more than {_DEPTH} deep")
        if isinstance(one, Mapping):
            waiting += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list | tuple | set):
            waiting += [(part, depth + 1) for part in one]
    return min(total, LENGTH + 1)


def check_length(size: int) -> int:
    if size > LENGTH:
        raise SecurityError(f"it makes a text or list longer than {LENGTH}")
    return size


def check_operator(operator: str, left: object, right: object) -> None:
    """Refuse a huge product, power, sum or format before it is computed."""
    if operator == "+":
        check_length(length(left) + length(right))
    elif operator == "%":
        if isinstance(left, str | bytes):
            check_format(left, [right])
    elif isinstance(left, int) and isinstance(right, int):
        bits = right * left.bit_length() if operator == "**" else left.bit_length()
        if max(bits, right.bit_length()) > _BITS:
            raise SecurityError(f"{operator} makes a number of more than {_BITS} bits")
    elif operator == "*":
        check_length(length(left) * right if isinstance(right, int) else 0)
        check_length(length(right) * left if isinstance(left, int) else 0)


def length(value: object) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def check_call(
    name: str, subject: object, args: Sequence[object], names: Mapping[str, object]
) -> None:
    """Refuse a method or filter of this name if its result would be huge."""
    values = [*args, *names.values()]
    if name in ("format", "format_map"):
        check_format(subject if isinstance(subject, str) else str(subject), values)
    elif name == "replace":
        check_length(_replaced(subject, *_two(args, names, "old", "new")))
    elif name in _RESULTS:
        check_length(_RESULTS[name](subject, values))
    elif name == "round" and any(_number(one) > _PRECISION for one in values):
        raise SecurityError(f"it rounds to more than {_PRECISION} places")
    elif name == "sum" and any(isinstance(one, list | tuple) for one in values):
        raise SecurityError("it sums lists; add them with +")
    elif name == "translate":
        raise SecurityError("it translates a text; use replace")


def check_format(text: str | bytes, values: Iterable[object]) -> None:
    """Refuse a format whose widths and arguments would make a huge text."""
    shown = text.decode("latin-1") if isinstance(text, bytes) else text
    if _SPECS.search(shown):
        raise SecurityError("a format takes its width from an argument")
    widths = sum(_number(int(digits[:10])) for digits in re.findall(r"\d+", shown))
    fields = shown.count("%") + shown.count("{")
    check_length(len(shown) + widths + fields * max(map(measure, values), default=0))


def check_indent(indent: object) -> None:
    """Of JSON, where the deepest value has it many times."""
    if _number(indent) > _INDENT or length(indent) > _INDENT:
        raise SecurityError(f"it indents JSON by more than {_INDENT}")


def _number(value: object) -> int:
    return abs(int(value)) if isinstance(value, int | float) and abs(value) < 1e18 else 0


def _largest(subject: object, values: Sequence[object]) -> int:
    return max((abs(one) for one in values if isinstance(one, int)), default=0)


def _tabs(subject: Any, values: Sequence[object]) -> int:
    found = subject.count("\t" if isinstance(subject, str) else b"\t")
    return length(subject) + int(found) * _largest(subject, values)


def _indented(subject: object, values: Sequence[object]) -> int:
    text = str(subject)
    width = max(_largest(subject, values), *(length(one) for one in values), 4)
    return len(text) + (len(text.splitlines()) + 1) * width


def _two(
    args: Sequence[object], names: Mapping[str, object], first: str, second: str
) -> tuple[object, object]:
    """Two arguments, by place or by name."""
    named = dict(zip((first, second), args, strict=False)) | dict(names)
    return named.get(first, ""), named.get(second, "")


def _replaced(subject: object, old: object, new: object) -> int:
    if isinstance(subject, bytes):
        found = subject.count(old) if isinstance(old, bytes) else 0
        return len(subject) + found * length(new)
    text = str(subject)
    return len(text) + text.count(str(old)) * min(measure(new), LENGTH)


def _joined(subject: object, values: Sequence[object]) -> int:
    """Of the filter, whose subject are the parts, or of the method, whose subject is between."""
    parts, between = (values[:1] or [()])[0], length(subject)
    if not isinstance(subject, str | bytes):
        parts, between = subject, max(map(length, values), default=0)
    if not isinstance(parts, list | tuple | dict | set | str):
        return 0
    return sum(min(measure(one), LENGTH) + between for one in parts)


# How long the result of a method or filter will be.
_RESULTS: Mapping[str, Callable[[Any, Sequence[object]], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _largest),
    "expandtabs": _tabs,
    "indent": _indented,
    "join": _joined,
}
