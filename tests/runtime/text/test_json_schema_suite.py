"""The JSON Schema Test Suite: nothing that a schema forbids is ever allowed."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from gemma_runtime.errors import ConstraintError
from gemma_runtime.text.constraint import Constraint
from gemma_runtime.text.json_schema import JsonSchema
from gemma_runtime.text.matcher import Matcher, allowed_tokens
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import Json

SUITE = Path(__file__).parents[2] / "data/json_schema_suite/draft2020-12.json"
GROUPS: list[Mapping[str, Json]] = json.loads(SUITE.read_text("utf-8"))
STOPS = [1]


def test_no_constraint_allows_an_instance_that_its_schema_forbids(tokenizer: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    groups = [(_compiled(group["schema"], tokenizer), group) for group in GROUPS]
    forbidden, valid = [], []
    for constraint, group in groups:
        if constraint is not None:
            forbidden += [(constraint, instance) for instance in group["invalid"]]
            valid += [(constraint, instance) for instance in group["valid"]]
    assert len([1 for constraint, _ in groups if constraint]) > 150
    assert len(forbidden) > 230
    assert [case for case in forbidden if _allows(*case, tokenizer)] == []
    assert len([1 for case in valid if _allows(*case, tokenizer)]) > 0.9 * len(valid)


def test_the_checker_agrees_with_the_suite_on_every_schema_that_it_reads() -> None:
    read = judged = 0
    for group in GROUPS:
        try:
            schema = JsonSchema(group["schema"])
        except ConstraintError:
            continue
        read += 1
        for is_valid, instances in ((True, group["valid"]), (False, group["invalid"])):
            judged += len(instances)
            wrong = [one for one in instances if (schema.check(one) == []) is not is_valid]
            assert wrong == [], group["schema"]
    assert read > 60
    assert judged > 200


def _compiled(schema: Json, tokenizer: Tokenizer) -> Constraint | None:
    try:
        constraint = Constraint.json_schema(json.dumps(schema))
        constraint.start(tokenizer, STOPS)
    except ConstraintError:
        return None
    return constraint


def _allows(constraint: Constraint, instance: Json, tokenizer: Tokenizer) -> bool:
    """Whether any spelling of the instance is a complete reply."""
    texts = {json.dumps(instance), json.dumps(instance, ensure_ascii=False)}
    return any(_accepts(constraint.start(tokenizer, STOPS), tokenizer, text) for text in texts)


def _accepts(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    try:
        for token in tokenizer.encode(text):
            matcher.accept(token)
    except ConstraintError:
        return False
    size = tokenizer.vocabulary_size
    return matcher.is_done or STOPS[0] in allowed_tokens(matcher.mask(), size)
