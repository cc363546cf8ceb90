"""Matchers by llguidance, which refuses what it can't guarantee. The extra `grammar` brings it.

https://github.com/guidance-ai/llguidance
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import numpy as np

from gemma_runtime.errors import ConstraintError, MissingExtra, TokenizerError
from gemma_runtime.text.constraint import Constraint, Kind
from gemma_runtime.text.matcher import Bits
from gemma_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Small models fill the budget with blanks if they may, so JSON is written as json.dumps does.
_JSON: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}
_LONGEST_REASON = 300
# Built in a second or two, so kept as long as the tokenizer; one for each set of stop tokens.
# Grammars are not kept: each is compiled in a few milliseconds.
_vocabularies: "WeakKeyDictionary[Tokenizer, dict[frozenset[int], LLTokenizer]]"
_vocabularies = WeakKeyDictionary()


def start_matcher(
    constraint: Constraint, tokenizer: Tokenizer, stop_tokens: Collection[int]
) -> "GrammarMatcher":
    """Compile a constraint. Raises ConstraintError, naming what can't be guaranteed."""
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise MissingExtra("llguidance", "grammar") from error
    try:
        grammar = _writers()[constraint.kind](constraint.text)
    except (ValueError, RecursionError) as error:
        raise _refusal(constraint, str(error)) from error
    matcher = llguidance.LLMatcher(_vocabulary(tokenizer, stop_tokens), grammar, log_level=0)
    if matcher.is_error():  # llguidance raises nothing
        raise _refusal(constraint, matcher.get_error())
    return GrammarMatcher(matcher, tokenizer)


class GrammarMatcher:
    """Follows a reply with llguidance."""

    def __init__(self, matcher: "LLMatcher", tokenizer: Tokenizer) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer  # llguidance asks it, but doesn't hold it

    def mask(self) -> Bits:
        bits = self._matcher.compute_bitmask()
        self._check()
        return np.frombuffer(bits, np.uint8)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        tokens = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    @property
    def is_done(self) -> bool:
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(
                f"the constraint can't be followed: {_one_line(self._matcher.get_error())}; "
                "simplify it"
            )


class _Words:
    """A tokenizer as llguidance wants it. Control tokens have names, but no text can match them."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Collection[int]) -> None:
        special = {*tokenizer.control_tokens, *stop_tokens}
        count = max(tokenizer.vocabulary_size, max(special) + 1)
        self.eos_token_id = min(stop_tokens)
        self.bos_token_id = None
        self.special_token_ids = sorted(special)
        self.tokens = [
            (tokenizer.piece(token) or "").encode()
            if token in special
            else tokenizer.token_bytes(token)
            for token in range(count)
        ]
        self._tokenizer = ref(tokenizer)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a forced text. The tokenizer reads ▁ as a blank; bytes keep it."""
        tokenizer = self._tokenizer()
        assert tokenizer is not None
        try:
            tokens = tokenizer.encode(text)
        except TokenizerError:
            tokens = []
        if tokenizer.decode(tokens) == text:
            return tokens
        return [tokenizer.byte_tokens[byte] for byte in text.encode()]


def _vocabulary(tokenizer: Tokenizer, stop_tokens: Collection[int]) -> "LLTokenizer":
    import llguidance

    known = _vocabularies.setdefault(tokenizer, {})
    key = frozenset(stop_tokens)
    if key not in known:
        words = _Words(tokenizer, stop_tokens)
        known[key] = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(words),
            n_vocab=len(words.tokens),
            eos_token=sorted(stop_tokens),
        )
    return known[key]


def _writers() -> Mapping[Kind, Callable[[str], str]]:
    """How each kind becomes a grammar of llguidance; they raise ValueError."""
    from llguidance import LLMatcher, grammar_from

    return {
        Kind.JSON_SCHEMA: lambda text: LLMatcher.grammar_from_json_schema(text, overrides=_JSON),
        Kind.REGEX: LLMatcher.grammar_from_regex,
        Kind.LARK: LLMatcher.grammar_from_lark,
        Kind.GBNF: lambda text: grammar_from("gbnf", text),
        Kind.CHOICE: lambda text: grammar_from("choice", text),
    }


def _refusal(constraint: Constraint, reason: str) -> ConstraintError:
    return ConstraintError(
        f"this {constraint.kind} can't be guaranteed: {_one_line(reason)}; change or remove that"
    )


def _one_line(reason: str) -> str:
    """llguidance's message without its state, source lines and the marks below them."""
    message = re.split(r"<(?:state|backtrace|grammar)>", reason)[0]
    lines = (line.strip() for line in message.splitlines())
    kept = " ".join(line for line in lines if not re.fullmatch(r"\^*|\d+ \|.*", line))
    return kept if len(kept) <= _LONGEST_REASON else f"{kept[:_LONGEST_REASON]}…"
