"""Grammars for the phone apps: what they allow is what llguidance allows."""

import json
import random
import re
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma_runtime.errors import ConstraintError
from gemma_runtime.text.byte_grammar import NOTHING, ByteGrammar
from gemma_runtime.text.json_schema import JsonSchema
from gemma_runtime.text.schema_grammar import compile_schema
from gemma_runtime.text.tools import Json, Schema
from tests.data.grammar_vectors import CASES, RANDOM, VECTORS, masks, vectors

VECTOR: Sequence[Mapping[str, Json]] = json.loads(VECTORS.read_text("utf-8"))
NAMES = st.sampled_from(["a", "b", "ab", "é"])


def schemas() -> st.SearchStrategy[Schema]:
    """Schemas that can be compiled."""
    limits = st.sampled_from([{}, {"minLength": 1}, {"maxLength": 3}])
    leaves = st.one_of(
        limits.map(lambda limit: {"type": "string", **limit}),
        st.sampled_from(["number", "integer", "boolean", "null"]).map(lambda name: {"type": name}),
        st.lists(st.sampled_from(["x", 1, None, True]), min_size=1).map(lambda x: {"enum": x}),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=2).map(lambda cases: {"anyOf": cases}),
            st.builds(_array, inner, st.integers(0, 2), st.none() | st.integers(2, 3)),
            st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.sets(NAMES)),
        ),
        max_leaves=5,
    )


def _array(items: Schema, least: int, most: int | None) -> Schema:
    limit = {} if most is None else {"maxItems": most}
    return {"type": "array", "items": items, "minItems": least, **limit}


def _object(properties: Mapping[str, Schema], required: set[str]) -> Schema:
    kept = sorted(required & properties.keys())
    closed = {"additionalProperties": False}
    return {"type": "object", "properties": properties, "required": kept, **closed}


def mask(grammar: ByteGrammar, state: int) -> str:
    allowed = sum(1 << b for b in range(256) if grammar.after(state, b) != NOTHING)
    return allowed.to_bytes(32, "little").hex() + ("$" if grammar.may_end(state) else "")


@pytest.mark.parametrize("vector", VECTOR)
def test_each_beginning_of_a_text_allows_what_llguidance_allows(vector: Mapping[str, Json]) -> None:
    grammar = ByteGrammar(vector["grammar"])
    for case in vector["texts"]:
        text = case["text"].encode()
        states = [grammar.follow(grammar.start, text[:end]) for end in range(len(text) + 1)]
        assert [mask(grammar, state) for state in states] == case["masks"], case["text"]


def test_the_vectors_are_those_of_llguidance_and_of_the_compiler() -> None:
    pytest.importorskip("llguidance")
    assert list(vectors()) == VECTOR
    assert len(VECTOR) == len(CASES) + RANDOM


@settings(max_examples=60)
@given(schema=schemas(), data=st.data())
def test_every_text_that_a_grammar_allows_is_a_value_of_its_schema(
    schema: Schema, data: st.DataObject
) -> None:
    grammar = ByteGrammar(compile_schema(schema))
    state, text = grammar.start, b""
    while not (grammar.may_end(state) and (len(text) > 40 or data.draw(st.booleans()))):
        allowed = [byte for byte in range(256) if grammar.after(state, byte) != NOTHING]
        if not allowed:
            break
        # The end of a string, array or object is taken when the text is long.
        ends = [byte for byte in allowed if byte in b'"]}'] if len(text) > 40 else []
        byte = data.draw(st.sampled_from(ends or allowed))
        state, text = grammar.after(state, byte), text + bytes([byte])
    assert grammar.may_end(state), text
    assert JsonSchema(schema).check(json.loads(text)) == []


@settings(max_examples=60)
@given(schema=schemas(), data=st.data())
def test_random_schemas_allow_what_llguidance_allows(schema: Schema, data: st.DataObject) -> None:
    pytest.importorskip("llguidance")
    grammar = ByteGrammar(compile_schema(schema))
    state, text = grammar.start, b""
    for _ in range(12):
        allowed = [byte for byte in range(256) if grammar.after(state, byte) != NOTHING]
        if not allowed:
            break
        byte = data.draw(st.sampled_from(allowed))
        state, text = grammar.after(state, byte), text + bytes([byte])
    assume(not re.search(rb"[eE][+-]?[0-9]{2}$", text))  # llguidance's exponents have no end
    assert mask(grammar, state) == masks(schema, text)[-1], text


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "minimum": 0}, "minimum"),
        ({"type": "string", "pattern": "a"}, "pattern"),
        ({"properties": {"a": {"type": "null"}}}, "type"),
        ({"type": "array"}, "items"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 1}, "maxItems"),
        ({"type": "object", "required": ["a"]}, '"a"'),
        ({"anyOf": [{"type": "null"}], "type": "null"}, '"type" stands next to "anyOf"'),
        ({"type": "string", "enum": [1]}, "enum"),
        ({"const": "\ud800"}, "can't be written"),
        ({"const": float("inf")}, "can't be written"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused_by_name(schema: Schema, named: str) -> None:
    with pytest.raises(ConstraintError, match=re.escape(named)):
        compile_schema(schema)


def test_numbers_stay_finite_and_end() -> None:
    grammar = ByteGrammar(compile_schema({"type": "number"}))
    assert grammar.follow(grammar.start, b"9" * 15 + b"." + b"9" * 15 + b"e99") != NOTHING
    for text in (b"9" * 16, b"1." + b"9" * 16, b"1e100"):
        assert grammar.follow(grammar.start, text) == NOTHING


def test_an_open_object_gets_no_other_keys() -> None:
    grammar = ByteGrammar(compile_schema({"type": "object", "properties": {}}))
    assert grammar.may_end(grammar.follow(grammar.start, b"{}"))
    assert grammar.follow(grammar.start, b'{"') == NOTHING


def test_a_long_text_is_followed_without_recursion() -> None:
    text = "x" * 5000
    grammar = ByteGrammar(compile_schema({"type": "array", "items": {"const": text}}))
    written = json.dumps([text, text]).encode()
    assert grammar.may_end(grammar.follow(grammar.start, written))


@pytest.mark.parametrize(
    "grammar",
    [
        None,
        [],
        {"nodes": [], "start": 0},
        {"nodes": [["text", "a"]], "start": 1},
        {"nodes": [["text", "a"]], "start": True},
        {"nodes": [["text", 1]], "start": 0},
        {"nodes": [["bytes", []]], "start": 0},
        {"nodes": [["bytes", [[9, 8]]]], "start": 0},
        {"nodes": [["bytes", [[0, 256]]]], "start": 0},
        {"nodes": [["seq", 0]], "start": 0},
        {"nodes": [["text", "a"], ["seq", 0, -1]], "start": 1},
        {"nodes": [["text", "a"], ["repeat", 0, 2, 1]], "start": 1},
        {"nodes": [["text", "a"], ["repeat", 0, -1, 1]], "start": 1},
        {"nodes": [["text", "a"], ["loop", 0]], "start": 1},
    ],
    ids=str,
)
def test_a_damaged_grammar_is_refused(grammar: Json) -> None:
    with pytest.raises(ConstraintError, match="compile it again"):
        ByteGrammar(grammar)


@pytest.mark.parametrize(
    "nodes",
    [
        [["repeat", index, 0, 2] for index in range(100_000)],  # nested
        [["repeat", 0, 0, 1], ["seq", *[1] * 100_000]],  # any number may be left out
        [["seq", index, index] for index in range(60)],  # 2 to the power of 60
        [
            *(["text", str(n)] for n in range(1000)),
            ["alt", *range(1, 1001)],
            ["alt", *[1001] * 4000],
        ],
        # The 30th byte before the end is an a: a state for each set of places.
        [["bytes", [[97, 98]]], ["repeat", 1, 0, None], ["repeat", 1, 30, 30], ["seq", 2, 0, 3]],
    ],
    ids=["deep", "optional", "doubled", "joined", "ambiguous"],
)
def test_a_grammar_that_is_too_deep_or_grows_without_end_is_refused(nodes: list[Json]) -> None:
    """They overflowed the stack, or took all memory."""
    draw = random.Random(1)

    def follow() -> None:
        grammar = ByteGrammar({"nodes": [["text", "a"], *nodes], "start": len(nodes)})
        grammar.follow(grammar.start, bytes(draw.choice(b"ab") for _ in range(100_000)))

    with pytest.raises(ConstraintError, match="too large"):
        follow()
