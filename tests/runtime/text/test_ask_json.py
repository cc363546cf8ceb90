"""JSON that is asked for and checked, with the cases that Kotlin and Swift share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import ConstraintError
from gemma_runtime.text.ask_json import JsonAnswer, ask_json
from gemma_runtime.text.json_schema import JsonSchema
from gemma_runtime.text.json_text import extract_json, parse_json
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import Json
from tests.runtime.text.scripted import Recording
from tests.runtime.text.test_conversation import talk

SHARED = Path(__file__).parents[2] / "data" / "schema_cases.json"
CASES: Mapping[str, Sequence[Mapping[str, Json]]] = json.loads(SHARED.read_text("utf-8"))
AGE = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def ask(tokenizer: Tokenizer, replies: Sequence[str], retries: int = 1) -> tuple[JsonAnswer, str]:
    """The answer of a model that says these replies, and all that the model has seen."""
    session = Recording([tokenizer.encode(reply) for reply in replies])
    answer = ask_json(talk(session, tokenizer), "Ada is 36.", AGE, retries=retries)
    return answer, tokenizer.decode(session.tokens)


@pytest.mark.parametrize("case", CASES["parse"], ids=lambda case: case["text"][:20])
def test_json_is_parsed_strictly(case: Mapping[str, Json]) -> None:
    if case["ok"]:
        value = parse_json(case["text"])
        assert parse_json(json.dumps(value)) == value
    else:
        with pytest.raises(ValueError, match=r"."):
            parse_json(case["text"])


@pytest.mark.parametrize("case", CASES["extract"], ids=lambda case: case["text"][:20])
def test_json_is_extracted_from_the_text_around_it(case: Mapping[str, Json]) -> None:
    if case["json"] is None:
        with pytest.raises(ValueError, match=r"."):
            extract_json(case["text"])
    else:
        assert extract_json(case["text"]) == json.loads(case["json"])


@given(st.text('{}[]",:0123.eE+-truefalsn\\u\x00 \U0001f600', max_size=24))
def test_any_text_is_parsed_or_refused_with_a_value_error(text: str) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert json.loads(text) == value


def test_json_nested_too_deep_is_refused() -> None:
    with pytest.raises(ValueError, match="too deep"):
        parse_json("[" * 1_000_000)


@pytest.mark.parametrize("group", CASES["validate"])
def test_a_check_names_the_path_of_each_violation(group: Mapping[str, Json]) -> None:
    schema = JsonSchema(group["schema"])
    for case in group["cases"]:
        paths = sorted({violation.path for violation in schema.check(case["json"])})
        assert paths == case["paths"], case


@pytest.mark.parametrize("case", CASES["refuse"])
def test_an_unsupported_keyword_or_a_wrong_value_is_refused_by_name(
    case: Mapping[str, Json],
) -> None:
    with pytest.raises(ConstraintError) as caught:
        JsonSchema(case["schema"])
    assert case["names"] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_enum_and_a_const_both_count() -> None:
    schema = JsonSchema({"const": 1, "enum": [2]})
    assert len(schema.check(1)) == len(schema.check(2)) == 1


def test_numbers_without_limits_may_be_infinite() -> None:
    """A KeyError: the missing limit was replaced by infinity."""
    assert JsonSchema({"type": "number"}).check(float("inf")) == []


def test_a_valid_reply_is_the_answer(tokenizer: Tokenizer) -> None:
    answer, seen = ask(tokenizer, ['Sure: {"age": 36}.'])
    assert (answer.value, answer.is_valid, answer.attempts) == ({"age": 36}, True, 1)
    assert json.dumps(AGE) in seen


def test_after_a_wrong_reply_the_model_is_told_what_is_wrong(tokenizer: Tokenizer) -> None:
    replies = ['{"age": "old"}', '{"age": 36}']
    answer, seen = ask(tokenizer, replies)
    assert (answer.value, answer.is_valid, answer.attempts) == ({"age": 36}, True, 2)
    assert "- $.age: expected integer" in seen
    assert answer.new_tokens == sum(map(len, map(tokenizer.encode, replies)))


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (1, 2), (2, 3)])
def test_the_last_reply_is_returned_if_all_are_wrong(
    tokenizer: Tokenizer, retries: int, attempts: int
) -> None:
    answer, _ = ask(tokenizer, ["no", "no", "{"], retries)
    assert (answer.value, answer.is_valid, answer.attempts) == (None, False, attempts)
    assert answer.violations[0].message == "the answer has no complete JSON value"
