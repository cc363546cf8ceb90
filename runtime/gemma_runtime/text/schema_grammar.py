"""Compiles a JSON Schema to a grammar of bytes, for the phone apps.

Known keywords: type, enum, const, anyOf, properties, required, additionalProperties, items, and
the lengths of strings and arrays. JSON is written as json.dumps does, keys in the schema's order.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from gemma_runtime.errors import ConstraintError
from gemma_runtime.text.constraint import read_file
from gemma_runtime.text.json_schema import JsonSchema
from gemma_runtime.text.json_text import parse_json
from gemma_runtime.text.tools import Json, Schema

_NUMBER_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_TYPES = (
    *_NUMBER_LIMITS,
    *("properties", "required", "additionalProperties", "items"),
    *("minItems", "maxItems", "minLength", "maxLength"),
)
_CONTINUED = (0x80, 0xBF)  # any byte of a character in UTF-8 but the first
# The well-formed characters beyond ASCII (Unicode 15, table 3-7).
_CHARACTERS = (
    ((0xC2, 0xDF), _CONTINUED),
    ((0xE0, 0xE0), (0xA0, 0xBF), _CONTINUED),
    ((0xE1, 0xEC), _CONTINUED, _CONTINUED),
    ((0xED, 0xED), (0x80, 0x9F), _CONTINUED),
    ((0xEE, 0xEF), _CONTINUED, _CONTINUED),
    ((0xF0, 0xF0), (0x90, 0xBF), _CONTINUED, _CONTINUED),
    ((0xF1, 0xF3), _CONTINUED, _CONTINUED, _CONTINUED),
    ((0xF4, 0xF4), (0x80, 0x8F), _CONTINUED, _CONTINUED),
)
_DIGITS = 15  # a double keeps this many


def read_schema(path: Path) -> Schema:
    """The JSON Schema in a file. Raises ConstraintError."""
    try:
        schema = parse_json(read_file(path))
    except ValueError as error:
        raise ConstraintError(f"{path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConstraintError(f"{path} is not a JSON Schema: expected an object")
    return schema


def compile_schema(schema: Schema) -> dict[str, Json]:
    """A grammar that allows only values of a schema; `ByteGrammar` reads it.

    An object gets no keys but those named. Raises ConstraintError for what can't be kept.
    """
    nodes = _Nodes()
    try:
        JsonSchema(schema)  # refuses unknown keywords and wrong values
        start = _value(nodes, schema)
    except RecursionError as error:
        raise ConstraintError("the schema is nested too deep; flatten it") from error
    return {"nodes": nodes.written, "start": start}


class _Nodes:
    """The nodes so far; equal ones are written once."""

    def __init__(self) -> None:
        self.written: list[Json] = []
        self._numbers: dict[str, int] = {}

    def add(self, kind: str, *parts: Json) -> int:
        node = [kind, *parts]
        key = json.dumps(node)
        if key not in self._numbers:
            self._numbers[key] = len(self.written)
            self.written.append(node)
        return self._numbers[key]

    def text(self, text: str) -> int:
        return self.add("text", text)

    def bytes(self, *ranges: tuple[int, int]) -> int:
        return self.add("bytes", [list(one) for one in ranges])

    def seq(self, *parts: int) -> int:
        return self.add("seq", *parts)

    def alt(self, *cases: int) -> int:
        return self.add("alt", *cases)

    def optional(self, *parts: int) -> int:
        return self.add("repeat", self.seq(*parts), 0, 1)

    def repeat(self, body: int, least: int, most: int | None) -> int:
        return self.add("repeat", body, least, most)


def _value(nodes: _Nodes, schema: Schema) -> int:
    if "const" in schema or "enum" in schema:
        return _literals(nodes, schema)
    if "anyOf" in schema:
        if others := [name for name in schema if name in (*_OF_TYPES, "type")]:
            raise ConstraintError(f'"{others[0]}" stands next to "anyOf"; move it into its cases')
        return nodes.alt(*(_value(nodes, case) for case in schema["anyOf"]))
    if "type" not in schema:
        raise ConstraintError('a part of the schema has no "type"; give one')
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return nodes.alt(*(_WRITERS[name](nodes, schema) for name in types))


def _literals(nodes: _Nodes, schema: Schema) -> int:
    """The values of an enum that the other keywords allow too."""
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    checked = JsonSchema(schema)
    allowed = [value for value in values if not checked.check(value)]
    if not allowed:
        raise ConstraintError("no value of an enum is allowed by the keywords beside it")
    return nodes.alt(*(nodes.text(_json(value)) for value in allowed))


def _object(nodes: _Nodes, schema: Schema) -> int:
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    if unknown := [name for name in required if name not in properties]:
        raise ConstraintError(f'the required "{unknown[0]}" is not among the properties; add it')
    # What follows, last property first: if a key was written, and if none was.
    later = first = nodes.text("}")
    for name, value in reversed(properties.items()):
        member = nodes.seq(nodes.text(f"{_json(name)}: "), _value(nodes, value))
        with_comma = nodes.seq(nodes.text(", "), member, later)
        without = nodes.seq(member, later)
        is_required = name in required
        first = without if is_required else nodes.alt(without, first)
        later = with_comma if is_required else nodes.alt(with_comma, later)
    return nodes.seq(nodes.text("{"), first)


def _array(nodes: _Nodes, schema: Schema) -> int:
    least, most = _limits(schema, "minItems", "maxItems")
    if most == 0:
        return nodes.text("[]")
    if "items" not in schema:
        raise ConstraintError('an array of the schema has no "items"; give them a schema')
    item = _value(nodes, schema["items"])
    more = nodes.repeat(
        nodes.seq(nodes.text(", "), item), max(least - 1, 0), None if most is None else most - 1
    )
    items = nodes.seq(item, more)
    inner = items if least > 0 else nodes.optional(items)
    return nodes.seq(nodes.text("["), inner, nodes.text("]"))


def _string(nodes: _Nodes, schema: Schema) -> int:
    plain = nodes.bytes((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E))
    short = nodes.bytes(*((ord(letter), ord(letter)) for letter in '"\\bfnrt'))
    wide = [nodes.seq(*(nodes.bytes(one) for one in parts)) for parts in _CHARACTERS]
    hex_digit = nodes.bytes((0x30, 0x39), (0x41, 0x46), (0x61, 0x66))
    control = nodes.alt(
        nodes.seq(nodes.bytes((0x30, 0x31)), hex_digit),
        nodes.seq(nodes.text("7"), nodes.bytes((0x46, 0x46), (0x66, 0x66))),
    )
    escaped = nodes.alt(short, nodes.seq(nodes.text("u00"), control))
    character = nodes.alt(plain, nodes.seq(nodes.text("\\"), escaped), *wide)
    quote = nodes.text('"')
    return nodes.seq(
        quote, nodes.repeat(character, *_limits(schema, "minLength", "maxLength")), quote
    )


def _integer(nodes: _Nodes, schema: Schema) -> int:
    if limits := [name for name in _NUMBER_LIMITS if name in schema]:
        raise ConstraintError(f'"{limits[0]}" is not compiled; give the values as an enum')
    digit = nodes.bytes((0x30, 0x39))
    whole = nodes.seq(nodes.bytes((0x31, 0x39)), nodes.repeat(digit, 0, _DIGITS - 1))
    return nodes.seq(nodes.optional(nodes.text("-")), nodes.alt(nodes.text("0"), whole))


def _number(nodes: _Nodes, schema: Schema) -> int:
    digit = nodes.bytes((0x30, 0x39))
    fraction = nodes.optional(nodes.text("."), nodes.repeat(digit, 1, _DIGITS))
    sign = nodes.optional(nodes.bytes((0x2B, 0x2B), (0x2D, 0x2D)))
    exponent = nodes.optional(
        nodes.bytes((0x45, 0x45), (0x65, 0x65)), sign, nodes.repeat(digit, 1, 2)
    )
    return nodes.seq(_integer(nodes, schema), fraction, exponent)


_WRITERS: Mapping[str, Callable[[_Nodes, Schema], int]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "number": _number,
    "integer": _integer,
    "boolean": lambda nodes, _: nodes.alt(nodes.text("true"), nodes.text("false")),
    "null": lambda nodes, _: nodes.text("null"),
}


def _limits(schema: Schema, least: str, most: str) -> tuple[int, int | None]:
    low, high = int(schema.get(least, 0)), schema.get(most)
    if high is not None and high < low:
        raise ConstraintError(f'"{most}" is {high}, less than "{least}"')
    return low, None if high is None else int(high)


def _json(value: Json) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()  # fails for an unpaired surrogate
    except ValueError as error:
        raise ConstraintError(f"a value of the schema can't be written as JSON: {error}") from error
    return text
