"""Writes what llguidance allows after each byte of some texts: the apps' grammars allow the same.

    python -m tests.data.grammar_vectors     # grammar_vectors.json, committed

Each schema comes compiled, with texts. A text has a mask for each of its beginnings: 32 bytes in
hexadecimal, in which byte b is bit `b % 8` of byte `b // 8`, and `$` if the text may end there.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gemma_runtime.text.schema_grammar import compile_schema
from gemma_runtime.text.tools import Json, Schema

VECTORS = Path(__file__).with_name("grammar_vectors.json")
END = 256  # the stop token of a vocabulary of bytes
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
    for schema, texts in CASES:
        yield {
            "schema": schema,
            "grammar": compile_schema(schema),
            "texts": [{"text": text, "masks": masks(schema, text.encode())} for text in texts],
        }


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
