"""Generation under a constraint, with a matcher that needs no other package."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import SessionError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.generate import (
    Generation,
    StopReason,
    TextGeneration,
    generate,
    generate_text,
)
from gemma_runtime.text.matcher import Matcher, allowed_tokens
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS
from tests.runtime.text.scripted import END, VOCABULARY, OneOf, Recording
from tests.runtime.text.test_conversation import say, talk


class Counting(FakeSession):
    """A session that wants the tokens in order of their ids, and records what it was fed."""

    def __init__(self, context_length: int = 4096) -> None:
        super().__init__(lambda tokens: -np.arange(VOCABULARY, dtype=np.float32), context_length)
        self.fed: list[list[int]] = []

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self.fed.append(list(tokens))
        return super().prefill(tokens)


def run(
    session: FakeSession, tokenizer: Tokenizer, matcher: Matcher, limit: int = 50, stop: str = ""
) -> TextGeneration:
    generation = generate_text(
        session,
        tokenizer,
        [BOS, 9],
        max_new_tokens=limit,
        stop_tokens=[END],
        stop_strings=[stop] if stop else [],
        constraint=matcher,
    )
    list(generation)
    return generation


def test_a_token_is_chosen_among_those_allowed() -> None:
    session = Counting()
    assert list(generate(session, [BOS], max_new_tokens=9, constraint=OneOf([40], [30]))) == [30]


def test_forced_tokens_are_fed_with_the_choice_before_them(tokenizer: Tokenizer) -> None:
    session = Counting()
    matcher = OneOf([20, 21, 22, 30, 31, 32], [20, 21, 22, 40, 41])
    generation = run(session, tokenizer, matcher)
    assert list(generation.tokens) == [20, 21, 22, 30, 31, 32]
    assert session.fed == [[BOS, 9, 20, 21, 22]]
    again = OneOf([20, 30, 31, 50], [20, 30, 31, 60], [20, 40])
    session.reset()
    session.fed.clear()
    assert list(run(session, tokenizer, again).tokens) == [20, 30, 31, 50]
    assert session.fed == [[BOS, 9, 20], [30, 31]]


def test_a_text_without_a_choice_asks_the_model_nothing(tokenizer: Tokenizer) -> None:
    session = Counting()
    generation = run(session, tokenizer, OneOf([20, 21]))
    assert (list(generation.tokens), session.fed) == ([20, 21], [])
    assert generation.result.complete


def test_the_model_can_end_a_text_where_that_is_allowed() -> None:
    session = Counting()
    tokens = generate(
        session, [BOS], max_new_tokens=9, stop_tokens=[END], constraint=OneOf([], [30])
    )
    assert list(tokens) == []


@pytest.mark.parametrize(
    ("context", "limit", "count", "reason", "complete"),
    [
        (4096, 50, 5, StopReason.CONSTRAINT, True),
        (4096, 5, 5, StopReason.CONSTRAINT, True),
        (4096, 4, 4, StopReason.LENGTH, False),  # within the forced tokens
        (4096, 1, 1, StopReason.LENGTH, False),
        (6, 50, 5, StopReason.CONSTRAINT, True),  # the last token is never fed
        (5, 50, 4, StopReason.CONTEXT, False),
        (2, 50, 1, StopReason.CONTEXT, False),
    ],
)
def test_a_text_that_a_limit_cuts_is_not_complete(
    tokenizer: Tokenizer, context: int, limit: int, count: int, reason: StopReason, complete: bool
) -> None:
    session = Counting(context)
    matcher = OneOf([20, 30, 31, 32, 33], [20, 40])
    result = run(session, tokenizer, matcher, limit).result
    assert (result.new_tokens, result.reason, result.complete) == (count, reason, complete)
    assert session.position <= context


def test_a_text_that_a_stop_string_cuts_is_complete_only_without_a_constraint(
    tokenizer: Tokenizer,
) -> None:
    """JSON cut by a stop string counted as valid."""
    text = tokenizer.encode("in the end")
    cut = run(Counting(), tokenizer, OneOf(text), stop="the").result
    assert (cut.text, cut.reason, cut.complete) == ("in ", StopReason.STOP_STRING, False)
    free = generate_text(
        Recording([text]), tokenizer, [BOS, 9], max_new_tokens=50, stop_strings=["the"]
    )
    list(free)
    assert (free.result.text, free.result.complete) == ("in ", True)


def test_the_first_token_is_timed_at_the_first_choice(tokenizer: Tokenizer) -> None:
    result: Generation = run(Counting(), tokenizer, OneOf([20, 30], [20, 40])).result
    assert 0 < result.first_token_seconds <= result.seconds


@given(
    texts=st.sets(st.text("abc", min_size=3, max_size=3), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    limit=st.integers(1, 5),
    context=st.integers(2, 8),
)
def test_any_generation_is_a_beginning_of_an_allowed_text(
    texts: set[str], seed: int, limit: int, context: int
) -> None:
    sequences = [[ord(letter) for letter in text] for text in sorted(texts)]
    noise = np.random.default_rng(seed).standard_normal((9, VOCABULARY)).astype(np.float32)
    session = FakeSession(lambda tokens: noise[len(tokens)], context)
    sampling = Sampling(temperature=1, top_k=5, top_p=0.9, repetition_penalty=1.5, seed=seed)
    tokens = list(
        generate(
            session,
            [BOS, 9],
            max_new_tokens=limit,
            sampling=sampling,
            stop_tokens=[END],
            constraint=OneOf(*sequences),
        )
    )
    assert len(tokens) == min(3, limit, context - 2 + 1)
    assert any(sequence[: len(tokens)] == tokens for sequence in sequences)
    assert session.tokens == [BOS, 9, *tokens][: session.position]


def test_one_reply_of_a_conversation_is_constrained(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("the user")] * 3)
    chat = talk(session, tokenizer)
    yes, no = tokenizer.encode("yes"), tokenizer.encode("no")
    assert "".join(chat.send("in", constraint=OneOf(yes, no))) in ("yes", "no")
    assert say(chat, "us") == "the user"
    assert tokenizer.decode(session.tokens).count("model") == 2


def test_a_mask_may_be_shorter_or_longer_than_the_logits() -> None:
    bits = np.array([0b10000010], np.uint8)
    assert allowed_tokens(bits, 64).tolist() == [1, 7]
    assert allowed_tokens(bits, 7).tolist() == [1]
    with pytest.raises(SessionError, match="none of the model's tokens"):
        allowed_tokens(bits, 1)
