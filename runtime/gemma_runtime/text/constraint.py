"""Constrains a reply: JSON by a schema, a regular expression, a grammar, or one of some texts."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from gemma_runtime.errors import ConstraintError, SessionError
from gemma_runtime.text.json_text import parse_json
from gemma_runtime.text.matcher import Matcher
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import Json


class Kind(StrEnum):
    JSON_SCHEMA = "JSON Schema"
    REGEX = "regular expression"
    LARK = "Lark grammar"
    GBNF = "GBNF grammar"
    CHOICE = "list of choices"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a reply may be. Its tokens are chosen among those that lead to such a reply only.

    Control tokens are never part of the text, unless a Lark grammar names them.
    """

    kind: Kind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Json] | str) -> Self:
        """JSON of a schema (draft 2020-12 and older): on one line, keys in the schema's order.

        Raises ConstraintError if `schema` is not a JSON object.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
            value = parse_json(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConstraintError(f"the JSON Schema is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConstraintError(f"the JSON Schema is {text[:40]}, expected an object")
        if "x-guidance" in value:
            raise ConstraintError(
                "the JSON Schema has x-guidance, which loosens what is guaranteed; remove it"
            )
        return cls(Kind.JSON_SCHEMA, text)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """A text that a pattern matches from its start to its end.

        The syntax is that of https://docs.rs/regex: no look-around, no back-references.
        """
        return cls(Kind.REGEX, pattern)

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """A text of a Lark grammar, as llguidance reads it.

        https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
        """
        return cls(Kind.LARK, grammar)

    @classmethod
    def gbnf(cls, grammar: str) -> Self:
        """A text of a llama.cpp grammar.

        https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
        """
        return cls(Kind.GBNF, grammar)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """One of some texts. Raises ConstraintError if there is none, or one is empty."""
        if not texts or "" in texts:
            raise ConstraintError("a choice needs at least one text, and no empty one")
        return cls(Kind.CHOICE, json.dumps(list(texts)))

    @classmethod
    def read_grammar(cls, path: Path) -> Self:
        """The grammar in a `.lark` or `.gbnf` file."""
        makers = {".lark": cls.lark, ".gbnf": cls.gbnf}
        if path.suffix not in makers:
            raise ConstraintError(f"{path} ends in neither {' nor '.join(makers)}; rename it")
        return makers[path.suffix](read_file(path))

    @classmethod
    def read_json_schema(cls, path: Path) -> Self:
        """The JSON Schema in a file."""
        text = read_file(path)
        try:
            return cls.json_schema(text)
        except ConstraintError as error:
            raise ConstraintError(f"{path}: {error}") from error

    def start(self, tokenizer: Tokenizer, stop_tokens: Collection[int]) -> Matcher:
        """What follows one reply, which ends with any of the stop tokens.

        The first reply with a tokenizer takes about a second more. Raises ConstraintError if this
        can't be guaranteed, MissingExtra if llguidance is not installed.
        """
        from gemma_runtime.text.grammar import start_matcher

        if not stop_tokens:
            raise SessionError(
                "a constrained reply has no stop tokens; give the bundle's manifest.stop_tokens"
            )
        return start_matcher(self, tokenizer, stop_tokens)


def start_constraint(
    constraint: Constraint | Matcher | None, tokenizer: Tokenizer, stop_tokens: Collection[int]
) -> Matcher | None:
    """The matcher of a constraint; a matcher itself is passed on."""
    if isinstance(constraint, Constraint):
        return constraint.start(tokenizer, stop_tokens)
    return constraint


def read_file(path: Path) -> str:
    """A schema's or grammar's text. Raises ConstraintError."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConstraintError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConstraintError(f"{path} is not UTF-8 (byte {error.start})") from error
