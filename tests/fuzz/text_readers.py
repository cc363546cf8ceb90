"""Readers of text in and out: templates, schemas, grammars, tools, calls, turns."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.progress import QuietReporter
from gemma_export.sidecars.phone_files import phone_files
from gemma_runtime.errors import ConstraintError
from gemma_runtime.talk import _results
from gemma_runtime.text.byte_grammar import ByteGrammar
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.constraint import Constraint
from gemma_runtime.text.json_schema import JsonSchema
from gemma_runtime.text.json_text import extract_json, parse_json
from gemma_runtime.text.opening import read_examples
from gemma_runtime.text.schema_grammar import compile_schema, read_schema
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import find_calls, read_tools
from tests.data.tiny_bundle import TEMPLATE
from tests.fuzz.judge import Read
from tests.fuzz.reader import TINY, Reader, as_file, as_text


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(TINY / "tokenizer.json")


_TURNS = [Message("user", "hi {{ 1 }} <bos>"), Message("assistant", "yes"), Message("user", "a")]


def _template(text: str) -> None:
    encode_chat(_tokenizer(), text, _TURNS, bos_token=2)
    files = TokenizerFiles((TINY / "tokenizer.json").read_bytes(), text)
    phone_files(files, "<bos>", "<eos>", QuietReporter())


def _constraint(make: Callable[[str], Constraint]) -> Callable[[str], None]:
    """A constraint up to the tokens that may follow the first two."""

    def start(text: str) -> None:
        tokenizer = _tokenizer()
        matcher = make(text).start(tokenizer, [1])
        for _ in range(3):
            allowed = matcher.mask()
            place = next((at for at, byte in enumerate(allowed) if byte), None)
            if place is None or matcher.is_done:
                break
            byte = int(allowed[place])
            matcher.accept(8 * place + (byte & -byte).bit_length() - 1)

    return start


def _checked_json(text: str) -> None:
    """A reply's JSON; what is not JSON is ValueError by contract."""
    for read in (parse_json, extract_json):
        try:
            read(text)
        except ValueError:
            continue


def _schema(folder: Path) -> Read:
    def compiled(path: Path) -> None:
        schema = read_schema(path)
        JsonSchema(schema).check({"a": [1, "b"]})
        grammar = ByteGrammar(compile_schema(schema))
        grammar.follow(grammar.start, b'{"a": ["b", 1.5]')

    return as_file("s.json", compiled)(folder)


def _grammar(text: str) -> None:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ConstraintError(f"not JSON: {error!s:.100}") from error
    grammar = ByteGrammar(value)
    grammar.follow(grammar.start, b'{"a": 1}\xc3\xa9')


def _calls(text: str) -> None:
    find_calls(text, {"f", "name"})


_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        "b": {"enum": ["x", 1, None]},
        "c": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
    "required": ["a"],
    "additionalProperties": False,
}
_ODD_SCHEMA = {
    "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}},
    "anyOf": [{"$ref": "#/$defs/n"}, {"pattern": "^(a+)+$", "type": "string"}],
}
_TOOLS = [{"name": "f", "description": "d", "parameters": {"type": "object"}}]
_TEXTS = (
    '<|tool_call>call:f{a:<|"|>text<|"|>,b:[1,{c:true}]}<tool_call|>',
    "<start_function_call>call:f{a:<escape>t<escape>}<end_function_call>",
    '```json\n{"name": "f", "parameters": {"a": 1}}\n```',
    '[f(a="text", b=[1, {"c": None}])]',
)
_LARK = 'start: a | "x"\na: /[a-z]+/ b*\nb: "1".."9"\n'
_GBNF = 'root ::= "a" b+ | [0-9]{1,3}\nb ::= "c" root?\n'

TEXT_READERS: Mapping[str, Reader] = {
    "chat template": Reader(as_text(_template), [TEMPLATE, "{{ messages | tojson }}"]),
    "json schema": Reader(
        as_text(_constraint(Constraint.json_schema)), list(map(json.dumps, (_SCHEMA, _ODD_SCHEMA)))
    ),
    "regex": Reader(as_text(_constraint(Constraint.regex)), [r"(a|b+)*[^\d]{2,9}\p{L}?é"]),
    "lark": Reader(as_text(_constraint(Constraint.lark)), [_LARK]),
    "gbnf": Reader(as_text(_constraint(Constraint.gbnf)), [_GBNF]),
    "phone schema": Reader(_schema, [json.dumps(_SCHEMA)]),
    "byte grammar": Reader(as_text(_grammar), [json.dumps(compile_schema(_SCHEMA))]),
    "reply json": Reader(as_text(_checked_json), ['Here: {"a": [1.5, null, "é"]} done']),
    "tools": Reader(as_file("t.json", read_tools), [json.dumps(_TOOLS)]),
    "tool calls": Reader(as_text(_calls), _TEXTS),
    "tool results": Reader(as_text(lambda text: _results(f"/results {text}")), ['[{"a": 1}, "b"]']),
    "examples": Reader(
        as_file("e.json", read_examples),
        ['[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'],
    ),
}
