"""Measures how often JSON is valid: from a prompt alone, checked and asked again, and constrained.

    python benchmarks/structured.py out/gemma-3-270m-demo

Ten short texts in four languages, and five schemas with one example each. Counts don't depend on
how busy the machine is, so no times are printed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
from rich.console import Console
from rich.table import Table

from gemma_runtime import (
    Constraint,
    Conversation,
    Sampling,
    Session,
    generate_text,
    load_tokenizer,
    open_bundle,
    open_session,
)
from gemma_runtime.contents.subject import with_subject
from gemma_runtime.session import Logits
from gemma_runtime.text.ask_json import ask_json
from gemma_runtime.text.json_schema import JsonSchema
from gemma_runtime.text.json_text import parse_json
from gemma_runtime.text.tools import Json, Schema

_NEW_TOKENS = 200
_TEXTS = (
    "Maria Silva, 34, is a nurse in Lisbon and plays the violin.",
    "The Atlas 3 drill costs 89.90 euros, weighs 1.4 kg and is out of stock.",
    "On 12 March 2024 a fire broke out at the Hamburg harbour; two people were hurt.",
    "Kenji cooks ramen: noodles, broth, egg and spring onions, ready in 25 minutes.",
    "I hated the hotel: the room was dirty and the staff was rude.",
    "Great phone! The camera is superb, the battery lasts two days.",
    "El vuelo LH 442 sale de Fráncfort a las 10:05 y llega a Detroit a las 13:50.",
    "Bob owes Alice 20 dollars and promised to pay on Friday.",
    "Der Zug nach München fährt um 8 Uhr von Gleis 7 ab.",
    "La bibliothèque ouvre de 9 h à 18 h, sauf le dimanche.",
)


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _array(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


_STRING = {"type": "string", "maxLength": 60}
_NUMBER = {"type": "number"}
_FACT = _object(
    subject=_STRING,
    value={"anyOf": [_STRING, _NUMBER, {"type": "null"}]},
    certain={"type": "boolean"},
)


@dataclass(frozen=True, slots=True)
class _Task:
    schema: Schema
    text: str  # of the example
    answer: Json


_TASKS = (
    _Task(
        _object(
            title=_STRING,
            language={"enum": ["en", "de", "fr", "es"]},
            sentences={"type": "integer", "minimum": 1, "maximum": 9},
        ),
        "Rain fell all night in Oslo.",
        {"title": "Rain in Oslo", "language": "en", "sentences": 1},
    ),
    _Task(
        _object(
            people=_array(_STRING, maxItems=4),
            places=_array(_STRING, maxItems=4),
            numbers=_array(_NUMBER, maxItems=4),
        ),
        "Tom, 5, went to Rome.",
        {"people": ["Tom"], "places": ["Rome"], "numbers": [5]},
    ),
    _Task(
        _object(
            sentiment={"enum": ["positive", "negative", "neutral"]},
            score={"type": "number", "minimum": 0, "maximum": 1},
            reasons=_array(_STRING, minItems=1, maxItems=3),
        ),
        "The soup was cold.",
        {"sentiment": "negative", "score": 0.9, "reasons": ["cold soup"]},
    ),
    _Task(
        {
            "anyOf": [
                _object(name={"const": "search"}, arguments=_object(query=_STRING)),
                _object(
                    name={"const": "remind"},
                    arguments=_object(text=_STRING, minutes={"type": "integer"}),
                ),
                _object(name={"const": "none"}, arguments=_object()),
            ]
        },
        "Remind me of the cake in ten minutes.",
        {"name": "remind", "arguments": {"text": "cake", "minutes": 10}},
    ),
    _Task(
        _object(topic=_STRING, facts=_array(_FACT, minItems=1, maxItems=3)),
        "The tower is 90 m high.",
        {"topic": "tower", "facts": [{"subject": "height", "value": 90, "certain": True}]},
    ),
)


@dataclass(slots=True)
class Rate:
    """What came of all requests made in one way."""

    way: str
    temperature: float
    requests: int = 0
    valid_at_once: int = 0  # without a retry
    valid: int = 0
    wrong: int = 0  # JSON that the schema forbids
    none: int = 0  # no JSON
    new_tokens: int = 0
    model_calls: int = 0


@dataclass(frozen=True, slots=True)
class Structured:
    rates: tuple[Rate, ...]


@dataclass(frozen=True, slots=True)
class _Reply:
    value: Json
    is_json: bool
    new_tokens: int
    attempts: int = 1


class _Counting:
    """A session that counts the runs of the model."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self.calls += 1
        return self._session.prefill(tokens)

    def decode(self, token: int) -> Logits:
        self.calls += 1
        return self._session.decode(token)


class _Model:
    """A bundle that answers a task in each of the ways compared."""

    def __init__(self, bundle: Path, session: Session, temperature: float) -> None:
        self._bundle = open_bundle(bundle)
        self._tokenizer = load_tokenizer(self._bundle)
        self._session = session
        self._sampling = Sampling(temperature=temperature, seed=1)

    @property
    def ways(self) -> Mapping[str, Callable[[_Task, str], _Reply]]:
        return {
            "prompt": lambda task, text: self._continue(_prompt(task, text), None),
            "ask_json": self._ask,
            "constraint": lambda task, text: self._continue(_prompt(task, text), task.schema),
            "constraint, no example": lambda task, text: self._continue(
                _instruction(task) + _question(text), task.schema
            ),
        }

    def _continue(self, prompt: str, schema: Schema | None) -> _Reply:
        """What the model writes after a prompt: one line, or JSON of the schema."""
        self._session.reset()
        generation = generate_text(
            self._session,
            self._tokenizer,
            [self._bundle.manifest.bos_token, *self._tokenizer.encode(prompt)],
            max_new_tokens=_NEW_TOKENS,
            sampling=self._sampling,
            stop_tokens=self._bundle.manifest.stop_tokens,
            stop_strings=[] if schema else ["\n"],
            constraint=Constraint.json_schema(schema) if schema else None,
        )
        list(generation)
        try:
            value, is_json = parse_json(generation.result.text), True
        except ValueError:
            value, is_json = None, False
        return _Reply(value, is_json, generation.result.new_tokens)

    def _ask(self, task: _Task, text: str) -> _Reply:
        """The example stands in the request, since a base model follows no instruction."""
        manifest = self._bundle.manifest
        conversation = Conversation(
            self._session,
            self._tokenizer,
            template=manifest.chat_template,
            bos_token=manifest.bos_token,
            eos_token=manifest.eos_token,
            stop_tokens=manifest.stop_tokens,
            sampling=self._sampling,
        )
        request = f"Write JSON for the last text.\n\n{_example(task)}Text: {text}"
        answer = ask_json(conversation, request, task.schema, max_new_tokens=_NEW_TOKENS)
        is_json = answer.is_valid or answer.value is not None
        return _Reply(answer.value, is_json, answer.new_tokens, answer.attempts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--ways", nargs="+", help="some of the ways [all]")
    parser.add_argument("--texts", type=int, default=len(_TEXTS), help="how many of the texts")
    parser.add_argument("--threads", type=int, help="of the runtime [all cores]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=True)
    rates = []
    with open_session(open_bundle(options.bundle), options.threads) as opened:
        session = _Counting(opened)
        for temperature in options.temperatures:
            model = _Model(options.bundle, cast(Session, session), temperature)
            for way in options.ways or model.ways:
                rates.append(_measure(model, session, way, temperature, _TEXTS[: options.texts]))
                console.print(rates[-1])  # at once: each takes minutes
    if options.json:
        figures = with_subject(open_bundle(options.bundle), Structured(tuple(rates)))
        sys.stdout.buffer.write(msgspec.json.encode(figures) + b"\n")
    else:
        Console().print(_render(rates))


def _measure(
    model: _Model, session: _Counting, way: str, temperature: float, texts: Sequence[str]
) -> Rate:
    rate = Rate(way, temperature)
    before = session.calls
    for task in _TASKS:
        schema = JsonSchema(task.schema)
        for text in texts:
            reply = model.ways[way](task, text)
            is_valid = reply.is_json and not schema.check(reply.value)
            rate.requests += 1
            rate.valid_at_once += is_valid and reply.attempts == 1
            rate.valid += is_valid
            rate.wrong += reply.is_json and not is_valid
            rate.none += not reply.is_json
            rate.new_tokens += reply.new_tokens
    rate.model_calls = session.calls - before
    return rate


def _prompt(task: _Task, text: str) -> str:
    return _instruction(task) + _example(task) + _question(text)


def _instruction(task: _Task) -> str:
    return f"Write JSON for each text, by this schema: {json.dumps(task.schema)}\n\n"


def _example(task: _Task) -> str:
    return f"{_question(task.text)} {json.dumps(task.answer)}\n\n"


def _question(text: str) -> str:
    return f"Text: {text}\nJSON:"


def _render(rates: Sequence[Rate]) -> Table:
    table = Table("way", "T", "at once", "valid", "wrong JSON", "no JSON", "tokens", "model calls")
    for rate in rates:
        counts = (rate.wrong, rate.none, rate.new_tokens, rate.model_calls)
        valid = [f"{count}/{rate.requests}" for count in (rate.valid_at_once, rate.valid)]
        table.add_row(rate.way, str(rate.temperature), *valid, *(f"{one:,}" for one in counts))
    return table


if __name__ == "__main__":
    main()
