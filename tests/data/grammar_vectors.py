"""Writes what llguidance allows after each byte of some texts: the apps' grammars allow the same.

    python -m tests.data.grammar_vectors     # grammar_vectors.json, committed

Each schema comes compiled, with texts. A text has a mask for each of its beginnings: 32 bytes in
hexadecimal, in which byte b is bit `b % 8` of byte `b // 8`, and `$` if the text may end there.
Some schemas are written by hand, the others are random, with a short random beginning of a text.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gemma_runtime.text.byte_grammar import NOTHING, ByteGrammar
from gemma_runtime.text.schema_grammar import compile_schema
from gemma_runtime.text.tools import Json, Schema

VECTORS = Path(__file__).with_name("grammar_vectors.json")
END = 256  # the stop token of a vocabulary of bytes
RANDOM = 60  # random schemas
_LONGEST = 12  # bytes of a random text: each takes a mask, and the file is committed
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 2},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
CALL: Schema = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": PERSON},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in ("remind", "reply")
    ]
}
CASES: Sequence[tuple[Schema, Sequence[str]]] = (
    (PERSON, ['{"name": "Zoë \\n😀", "age": 36, "tags": ["a", null]}', '{"name": "", "tags": []}']),
    (CALL, ['{"name": "reply", "arguments": {"name": "x", "tags": ["b"]}}']),
    ({"type": "string"}, ['"a é日😀\\u001f\\u007F\\t\\"\\\\ z"']),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"aé"', '"\\u000a\\nz"']),
    ({"type": ["number", "null"]}, ["-12.50e-7", "0", "10E5", "null", "1.25"]),
    ({"type": "integer"}, ["-0", "120"]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, ["[true, false, true]"]),
    ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, ["[null]"]),
    (
        {"enum": ["red", "reddish", 'say "hi"\n', 12, -1.5, True, [1, {"a": None}]]},
        ['"reddish"', "12"],
    ),
    ({"type": "object", "properties": {}, "additionalProperties": False}, ["{}"]),
    (
        {
            "type": "object",
            "properties": {name: {"type": "null"} for name in ("a", "ab", "c")},
            "required": ["ab"],
            "additionalProperties": False,
        },
        ['{"a": null, "ab": null, "c": null}', '{"ab": null}'],
    ),
)


def vectors() -> Iterator[dict[str, Json]]:
    draw = random.Random(1)
    schemas = [_schema(draw, 2) for _ in range(RANDOM)]
    for schema, texts in (*CASES, *((schema, [_beginning(draw, schema)]) for schema in schemas)):
        yield {
            "schema": schema,
            "grammar": compile_schema(schema),
            "texts": [{"text": text, "masks": masks(schema, text.encode())} for text in texts],
        }


def _schema(draw: random.Random, depth: int) -> Schema:
    kinds = ["string", "number", "integer", "boolean", "null", "enum"]
    kind = draw.choice(["anyOf", "array", "object"] if depth and draw.random() < 0.7 else kinds)
    if kind == "anyOf":
        return {"anyOf": [_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "array":
        least = draw.randint(0, 2)
        limit = {"maxItems": least + draw.randint(0, 2)} if draw.random() < 0.8 else {}
        return {"type": kind, "items": _schema(draw, depth - 1), "minItems": least, **limit}
    if kind == "object":
        names = draw.sample(["a", "b", "ab", "é"], draw.randint(0, 3))
        return {
            "type": kind,
            "properties": {name: _schema(draw, depth - 1) for name in names},
            "required": [name for name in names if draw.random() < 0.5],
            "additionalProperties": False,
        }
    if kind == "enum":
        return {"enum": draw.sample(["x", "xy", 1, None, True], draw.randint(1, 3))}
    limits = [{"maxLength": 3}, {"minLength": 1, "maxLength": 2}, {}]
    return {"type": kind, **(draw.choice(limits) if kind == "string" else {})}


def _beginning(draw: random.Random, schema: Schema) -> str:
    """A random walk, which takes every second time a byte that leads on to other parts."""
    grammar = ByteGrammar(compile_schema(schema))
    state, text = grammar.start, b""
    while len(text) < _LONGEST:
        allowed = [byte for byte in range(256) if grammar.after(state, byte) != NOTHING]
        leading = [byte for byte in allowed if byte in b'"\\[]{},:.eE']
        if not allowed:
            break
        byte = draw.choice(leading if leading and draw.random() < 0.5 else allowed)
        if re.search(rb"[eE][+-]?[0-9]$", text) and chr(byte).isdigit():
            break  # llguidance's exponents have no end
        state, text = grammar.after(state, byte), text + bytes([byte])
    return text.decode(errors="ignore")  # maybe without half a character at its end


def masks(schema: Schema, text: bytes) -> list[str]:
    """What llguidance allows at the start, and after each byte."""
    import llguidance

    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = END, None, (END,)
        tokens = (*(bytes([byte]) for byte in range(END)), b"<eos>")

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=END + 1)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    )
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    found = [_written(matcher.compute_bitmask())]
    for byte in text:
        assert matcher.consume_token(byte), (schema, text, matcher.get_error()[:80])
        found.append(_written(matcher.compute_bitmask()))
    return found


def _written(mask: bytes) -> str:
    ends = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[END]
    return mask[: END // 8].hex() + ("$" if ends else "")


def main() -> None:
    lines = [json.dumps(vector, ensure_ascii=False) for vector in vectors()]
    VECTORS.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")


if __name__ == "__main__":
    main()
