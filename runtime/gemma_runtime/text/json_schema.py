"""Checks JSON values against a small part of JSON Schema: the part that the phone apps check.

Other keywords are refused, since ignoring one would accept wrong values. A `Constraint` knows more.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gemma_runtime.errors import ConstraintError
from gemma_runtime.text.tools import Json

_TYPES: Mapping[str, Callable[[Json], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == value // 1,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_LIMITS = (*_COUNTS, "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_ANNOTATIONS = ("title", "description", "$schema", "default", "examples")  # restrict nothing


@dataclass(frozen=True, slots=True)
class Violation:
    path: str  # such as $.people[0].age
    message: str


class JsonSchema:
    """A schema. Raises ConstraintError for a keyword or a value that is not supported."""

    def __init__(self, schema: Json) -> None:
        if not isinstance(schema, Mapping):
            raise ConstraintError(f"the schema is {_text(schema)[:40]}, expected an object")
        for name, value in schema.items():
            _check_keyword(name, value)
        types = schema.get("type", list(_TYPES))
        self._types = [types] if isinstance(types, str) else types
        self._choices = [schema["enum"]] if "enum" in schema else []
        self._choices += [[schema["const"]]] if "const" in schema else []
        self._alternatives = [JsonSchema(one) for one in schema.get("anyOf", [])]
        self._any_of = schema.get("anyOf")
        properties = schema.get("properties", {})
        self._properties = {name: JsonSchema(one) for name, one in properties.items()}
        self._required = schema.get("required", [])
        self._is_closed = not schema.get("additionalProperties", True)
        self._items = JsonSchema(schema["items"]) if "items" in schema else None
        self._limits = {name: schema[name] for name in _LIMITS if name in schema}

    def check(self, value: Json) -> list[Violation]:
        """Everything that is wrong with a value; empty if it is valid."""
        return list(self._check("$", value))

    def _check(self, path: str, value: Json) -> Iterator[Violation]:
        if any(_TYPES[name](value) for name in self._types):
            yield from (Violation(path, problem) for problem in self._size_problems(value))
        else:
            yield Violation(path, f"expected {' or '.join(self._types)}")
        for choices in self._choices:
            if not any(_is_equal(value, choice) for choice in choices):
                yield Violation(path, f"expected one of {_text(choices)}")
        if self._any_of is not None and all(any(s._check(path, value)) for s in self._alternatives):
            yield Violation(path, f"expected one of: {', '.join(map(_text, self._any_of))}")
        yield from self._child_problems(path, value)

    def _size_problems(self, value: Json) -> Iterator[str]:
        if _is_number(value):
            yield from self._limit_problems(value, "", "minimum", "maximum")
            if "exclusiveMinimum" in self._limits and value <= self._limits["exclusiveMinimum"]:
                yield f"expected more than {self._limits['exclusiveMinimum']}"
            if "exclusiveMaximum" in self._limits and value >= self._limits["exclusiveMaximum"]:
                yield f"expected less than {self._limits['exclusiveMaximum']}"
        elif isinstance(value, str):
            yield from self._limit_problems(len(value), " characters", "minLength", "maxLength")
        elif isinstance(value, list):
            yield from self._limit_problems(len(value), " items", "minItems", "maxItems")
        elif isinstance(value, dict):
            yield from (f'"{name}" is missing' for name in self._required if name not in value)

    def _limit_problems(self, size: float, unit: str, minimum: str, maximum: str) -> Iterator[str]:
        if minimum in self._limits and size < self._limits[minimum]:
            yield f"expected at least {self._limits[minimum]}{unit}"
        if maximum in self._limits and size > self._limits[maximum]:
            yield f"expected at most {self._limits[maximum]}{unit}"

    def _child_problems(self, path: str, value: Json) -> Iterator[Violation]:
        if isinstance(value, dict):
            for name, child in value.items():
                if name in self._properties:
                    yield from self._properties[name]._check(f"{path}.{name}", child)
                elif self._is_closed:
                    yield Violation(f"{path}.{name}", "is not expected here")
        if isinstance(value, list) and self._items is not None:
            for index, child in enumerate(value):
                yield from self._items._check(f"{path}[{index}]", child)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Json) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_list(value: Json) -> bool:
    return isinstance(value, list)


def _is_type(value: Json) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and name in _TYPES for name in names)


_NAMES = " or ".join(_TYPES)
_CHECKS: Mapping[str, tuple[Callable[[Json], bool], str]] = {
    "type": (_is_type, _NAMES),
    "enum": (_is_list, "a list"),
    "const": (lambda _: True, ""),
    "anyOf": (_is_list, "a list"),
    "properties": (lambda value: isinstance(value, Mapping), "an object"),
    "required": (
        lambda value: _is_list(value) and all(isinstance(name, str) for name in value),
        "a list of strings",
    ),
    "additionalProperties": (lambda value: isinstance(value, bool), "true or false"),
    "items": (lambda value: isinstance(value, Mapping), "an object"),
    **{name: (_is_number, "a number") for name in _LIMITS},
    **{name: (_is_count, "a whole number of at least 0") for name in _COUNTS},
}


def _check_keyword(name: str, value: Json) -> None:
    if name in _ANNOTATIONS:
        return
    if name not in _CHECKS:
        raise ConstraintError(
            f'the schema\'s keyword "{name}" is not supported; use only: {", ".join(_CHECKS)}'
        )
    is_valid, expected = _CHECKS[name]
    if not is_valid(value):
        raise ConstraintError(f'the schema\'s "{name}" is {_text(value)[:40]}, expected {expected}')


def _text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_equal(one: Json, other: Json) -> bool:
    """As JSON values: 1 equals 1.0, and true doesn't equal 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[name], other[name]) for name in one)
    return bool(one == other)
