"""Constraints that llguidance keeps."""

import gc
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_runtime.errors import ConstraintError, MissingExtra, SessionError
from gemma_runtime.session import FakeSession
from gemma_runtime.text.constraint import Constraint
from gemma_runtime.text.generate import Generation, StopReason, generate_text
from gemma_runtime.text.matcher import allowed_tokens
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS, SPECIAL

pytest.importorskip("llguidance")

STOPS = [1, 5]  # <eos>, <end_of_turn>
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TABLE = 'start: "| " cell " |\\n" row{2}\nrow: "| " cell " |\\n"\ncell: /[a-z]{1,3}/'
SUM = 'root ::= num ("+" num){0,3}\nnum ::= [0-9] [0-9]?'


def reply(tokenizer: Tokenizer, constraint: Constraint, seed: int, limit: int = 300) -> Generation:
    """What a model with random logits says under a constraint."""
    size = tokenizer.vocabulary_size
    noise = np.random.default_rng(seed)
    session = FakeSession(lambda _: noise.standard_normal(size).astype(np.float32))
    generation = generate_text(
        session,
        tokenizer,
        [BOS],
        max_new_tokens=limit,
        sampling=Sampling(temperature=1, seed=seed),
        stop_tokens=STOPS,
        constraint=constraint,
    )
    list(generation)
    return generation.result


@pytest.mark.parametrize("seed", range(20))
def test_random_logits_give_json_of_the_schema(tokenizer: Tokenizer, seed: int) -> None:
    result = reply(tokenizer, Constraint.json_schema(PERSON), seed)
    assert result.complete
    value = json.loads(result.text)
    assert result.text == json.dumps(value, ensure_ascii=False) or "\\" in result.text
    assert list(value) == ["name", "age", "tags"]
    assert len(value["name"]) <= 6
    assert 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 2
    assert set(value["tags"]) <= {"a", "b", None}


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint.regex("[12][0-9]{3}-(0[1-9]|1[0-2])"), "[12][0-9]{3}-(0[1-9]|1[0-2])"),
        (Constraint.lark(TABLE), r"(\| [a-z]{1,3} \|\n){3}"),
        (Constraint.gbnf(SUM), r"\d\d?(\+\d\d?){0,3}"),
        (Constraint.choice(["yes", "yes, of course", 'no "x"\n']), 'yes(, of course)?|no "x"\n'),
    ],
    ids=["regex", "lark", "gbnf", "choice"],
)
def test_random_logits_give_a_text_of_the_grammar(
    tokenizer: Tokenizer, constraint: Constraint, pattern: str
) -> None:
    for seed in range(20):
        result = reply(tokenizer, constraint, seed)
        assert re.fullmatch(pattern, result.text)
        assert result.complete
        assert result.reason in (StopReason.CONSTRAINT, StopReason.STOP_TOKEN)


@settings(max_examples=50)
@given(texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3))
def test_any_text_can_be_a_choice(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The tokenizer reads ▁ as a blank, so a forced ▁ was refused as a wrong token."""
    result = reply(tokenizer, Constraint.choice(texts), 1)
    assert result.text in texts
    assert result.complete


@pytest.mark.parametrize("text", ["<end_of_turn>", "a▁b", "▁", "tab\there", "<unused0> é😀\x00"])
def test_names_of_control_tokens_and_odd_characters_are_written_as_text(
    tokenizer: Tokenizer, text: str
) -> None:
    result = reply(tokenizer, Constraint.json_schema({"const": text}), 1)
    assert json.loads(result.text) == text
    assert reply(tokenizer, Constraint.choice([text]), 1).text == text


def test_no_control_token_is_allowed_within_a_text(tokenizer: Tokenizer) -> None:
    """`<end_of_turn>` inside a JSON string ended the reply."""
    matcher = Constraint.json_schema({"type": "string"}).start(tokenizer, STOPS)
    for token in matcher.forced():
        matcher.accept(token)
    allowed = set(allowed_tokens(matcher.mask(), tokenizer.vocabulary_size).tolist())
    assert len(allowed) > 100
    assert allowed.isdisjoint(tokenizer.control_tokens)
    free = Constraint.regex("(?s:.)*").start(tokenizer, STOPS)
    allowed = set(allowed_tokens(free.mask(), tokenizer.vocabulary_size).tolist())
    assert allowed & tokenizer.control_tokens == set(STOPS)


def test_a_lark_grammar_can_name_a_control_token(tokenizer: Tokenizer) -> None:
    matcher = Constraint.lark('start: "a" <start_of_turn>').start(tokenizer, STOPS)
    assert [tokenizer.piece(token) for token in matcher.forced()] == ["a", SPECIAL[4]]


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"if": {}, "then": {}}}}, "then"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
        ({"$ref": "https://example.org/x.json"}, "example.org"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"type": "text"}, "text"),
        ({"format": "colour", "type": "string"}, "colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "(?=a)b"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
    ],
)
def test_a_schema_that_cannot_be_guaranteed_is_refused_by_name(
    tokenizer: Tokenizer, schema: dict[str, object], named: str
) -> None:
    with pytest.raises(ConstraintError) as caught:
        Constraint.json_schema(schema).start(tokenizer, STOPS)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("true", "expected an object"),
        ("[1]", "expected an object"),
        ('{"type": "string", "type": "number"}', "occurs twice"),
        ('{"minimum": NaN}', "NaN"),
        ("[" * 100_000, "too deep"),
    ],
)
def test_a_text_that_is_no_schema_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConstraintError, match=named):
        Constraint.json_schema(text)


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        (Constraint.regex("(ab"), "unclosed group"),
        (Constraint.regex(r"(a)\1"), "backreferences"),
        (Constraint.lark("start: word"), '"word"'),
        (Constraint.lark('other: "a"'), "no start rule"),
        (Constraint.lark("start: <nothing>"), "<nothing>"),
        (Constraint.lark(""), "Empty"),
        (Constraint.gbnf('rule ::= "a"'), "root"),
        (Constraint.gbnf("root ::= " + "(" * 20_000), "recursion"),
    ],
)
def test_a_wrong_grammar_is_refused_in_one_line(
    tokenizer: Tokenizer, constraint: Constraint, named: str
) -> None:
    with pytest.raises(ConstraintError) as caught:
        constraint.start(tokenizer, STOPS)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450


@pytest.mark.parametrize("texts", [[], [""], ["a", ""]])
def test_a_choice_of_nothing_is_refused(texts: list[str]) -> None:
    with pytest.raises(ConstraintError, match="at least one text"):
        Constraint.choice(texts)


def test_a_wrong_token_is_refused(tokenizer: Tokenizer) -> None:
    matcher = Constraint.regex("a*").start(tokenizer, STOPS)
    with pytest.raises(ConstraintError, match="can't be followed"):
        matcher.accept(tokenizer.encode("b")[0])


def test_a_constraint_without_stop_tokens_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SessionError, match="no stop tokens"):
        Constraint.regex("a*").start(tokenizer, [])


def test_without_llguidance_the_error_names_the_extra(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"pip install 'gemma-export\[grammar\]'"):
        Constraint.regex("a").start(tokenizer, STOPS)


def test_a_tokenizer_is_prepared_once_and_then_let_go(tokenizer_path: Path) -> None:
    from gemma_runtime.text import grammar

    gc.collect()
    before = len(grammar._vocabularies)
    tokenizer = Tokenizer(tokenizer_path)
    matcher = Constraint.regex("a").start(tokenizer, STOPS)
    prepared = dict(grammar._vocabularies[tokenizer])
    Constraint.regex("b").start(tokenizer, STOPS)
    assert grammar._vocabularies[tokenizer] == prepared
    del tokenizer
    gc.collect()
    assert len(grammar._vocabularies) == before + 1  # the matcher still needs it
    assert [*matcher.forced()]
    del matcher, prepared
    gc.collect()
    assert len(grammar._vocabularies) == before


def test_grammars_and_schemas_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.lark").write_text('start: "é"', "utf-8")
    (tmp_path / "a.gbnf").write_text('root ::= "a"')
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.json").write_text('{"not": 1')
    assert Constraint.read_grammar(tmp_path / "a.lark") == Constraint.lark('start: "é"')
    assert Constraint.read_grammar(tmp_path / "a.gbnf") == Constraint.gbnf('root ::= "a"')
    with pytest.raises(ConstraintError, match=r"neither \.lark nor \.gbnf"):
        Constraint.read_grammar(tmp_path / "a.txt")
    with pytest.raises(ConstraintError, match=r"a\.json: the JSON Schema is not JSON"):
        Constraint.read_json_schema(tmp_path / "a.json")
    with pytest.raises(ConstraintError, match="can't read"):
        Constraint.read_json_schema(tmp_path / "b.json")
