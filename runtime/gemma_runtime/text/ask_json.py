"""Asks for JSON without a constraint: the reply is checked, and the model told what is wrong.

Nothing is guaranteed. The prompts are worded as in the phone apps.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.json_schema import JsonSchema, Violation
from gemma_runtime.text.json_text import extract_json
from gemma_runtime.text.tools import Json, Schema

_SHOWN = 8  # violations that the model is told of


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """The last reply to a request for JSON."""

    text: str
    value: Json  # the JSON in the text; None if there is none
    violations: tuple[Violation, ...]  # what is wrong with it; empty if it is valid
    attempts: int
    new_tokens: int  # of all attempts

    @property
    def is_valid(self) -> bool:
        return not self.violations


def ask_json(
    conversation: Conversation,
    request: str,
    schema: Schema,
    *,
    retries: int = 1,
    max_new_tokens: int = 512,
) -> JsonAnswer:
    """Send a request with a schema; after an invalid reply, send what is wrong with it.

    The last reply is returned, valid or not. Raises ConstraintError for a schema with keywords
    that `JsonSchema` doesn't check, and ContextFull as `Conversation.send` does.
    """
    checked = JsonSchema(schema)
    prompt = _request(request, schema)
    attempts = new_tokens = 0
    while True:
        reply = conversation.send(prompt, max_new_tokens)
        list(reply)
        attempts += 1
        new_tokens += reply.result.new_tokens
        value, violations = _read(reply.result.text, checked)
        if not violations or attempts > retries:
            return JsonAnswer(reply.result.text, value, violations, attempts, new_tokens)
        prompt = _correction(violations)


def _read(text: str, schema: JsonSchema) -> tuple[Json, tuple[Violation, ...]]:
    try:
        value = extract_json(text)
    except ValueError:
        return None, (Violation("$", "the answer has no complete JSON value"),)
    return value, tuple(schema.check(value))


def _request(request: str, schema: Schema) -> str:
    return (
        f"{request}\n\nAnswer with JSON alone, no other words, that matches this JSON Schema:\n"
        f"{json.dumps(schema, ensure_ascii=False)}"
    )


def _correction(violations: Sequence[Violation]) -> str:
    wrong = "\n".join(f"- {one.path}: {one.message}" for one in violations[:_SHOWN])
    return (
        f"That answer does not match the schema:\n{wrong}\n"
        "Answer again with the corrected JSON alone."
    )
