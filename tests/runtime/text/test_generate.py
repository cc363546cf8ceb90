from collections.abc import Sequence

import numpy as np
import pytest

from gemma_runtime.errors import ContextFull, SessionError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.generate import StopReason, TextGeneration, generate, generate_text
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS
from tests.runtime.text.scripted import one_hot


def replying(tokens: Sequence[int], after: int = 0) -> FakeSession:
    """A session that continues a prompt of `after` tokens with `tokens`, then with <eos>."""

    def script(so_far: Sequence[int]) -> Logits:
        index = len(so_far) - after
        return one_hot(tokens[index] if index < len(tokens) else 1)

    return FakeSession(script)


def saying(text: str, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> TextGeneration:
    """A generation in which the model says `text`."""
    return generate_text(
        replying(tokenizer.encode(text), after=1),
        tokenizer,
        [BOS],
        max_new_tokens=50,
        stop_tokens=[1],
        stop_strings=stop_strings,
    )


def counting(context_length: int = 4096) -> FakeSession:
    """A session that continues each token with the next larger id."""
    return FakeSession(lambda tokens: one_hot(tokens[-1] + 1), context_length)


def test_tokens_are_generated_until_the_stop_token() -> None:
    session = counting()
    assert list(generate(session, [10, 11], max_new_tokens=9, stop_tokens={15})) == [12, 13, 14]
    assert session.tokens == [10, 11, 12, 13, 14]


def test_the_last_requested_token_is_not_fed() -> None:
    session = counting()
    assert list(generate(session, [10], max_new_tokens=3)) == [11, 12, 13]
    assert session.tokens == [10, 11, 12]


def test_a_full_context_ends_the_generation_without_an_error() -> None:
    session = counting(context_length=4)
    assert list(generate(session, [10, 11], max_new_tokens=9)) == [12, 13, 14]
    assert session.position == 4


def test_a_prompt_that_is_too_long_is_refused_before_it_is_fed() -> None:
    session = counting(context_length=4)
    with pytest.raises(ContextFull):
        generate(session, [1, 2, 3, 4, 5], max_new_tokens=1)
    assert session.position == 0


@pytest.mark.parametrize(("prompt", "count"), [([], 1), ([1], 0)])
def test_an_empty_prompt_or_zero_new_tokens_are_refused(prompt: list[int], count: int) -> None:
    with pytest.raises(SessionError):
        generate(counting(), prompt, max_new_tokens=count)


def test_the_penalty_applies_to_prompt_and_history(tokenizer: Tokenizer) -> None:
    session = FakeSession(lambda tokens: np.array([3, 2.9, 2.8, 0, 0, 0, 0], np.float32))
    generation = generate_text(
        session,
        tokenizer,
        [1],
        max_new_tokens=2,
        sampling=Sampling(repetition_penalty=2.0),
        history=[0],
    )
    list(generation)
    assert list(generation.tokens) == [2, 0]


def test_text_streams_and_the_result_holds_all_of_it(tokenizer: Tokenizer) -> None:
    reply = tokenizer.encode("the user é")
    generation = generate_text(
        replying(reply, after=2), tokenizer, [BOS, 9], max_new_tokens=50, stop_tokens=[1]
    )
    pieces = list(generation)
    assert "".join(pieces) == "the user é"
    assert pieces[-1] == "é"
    result = generation.result
    assert (result.text, result.prompt_tokens) == ("the user é", 2)
    assert (result.new_tokens, result.reason) == (len(reply), StopReason.STOP_TOKEN)
    assert 0 < result.first_token_seconds <= result.seconds


@pytest.mark.parametrize(
    ("context", "count", "reason"),
    [(4096, 3, StopReason.LENGTH), (6, 99, StopReason.CONTEXT), (6, 5, StopReason.LENGTH)],
)
def test_the_reason_names_the_limit_that_was_reached(
    tokenizer: Tokenizer, context: int, count: int, reason: StopReason
) -> None:
    generation = generate_text(counting(context), tokenizer, [20, 21], max_new_tokens=count)
    list(generation)
    assert generation.result.reason is reason
    assert generation.result.new_tokens == min(count, context - 2 + 1)


def test_the_result_is_refused_before_the_end(tokenizer: Tokenizer) -> None:
    generation = generate_text(counting(), tokenizer, [20], max_new_tokens=3)
    next(iter(generation))
    with pytest.raises(SessionError, match="not finished"):
        _ = generation.result
    list(generation)
    assert generation.result.new_tokens == 3


def test_a_character_cut_by_the_length_ends_in_replacements(tokenizer: Tokenizer) -> None:
    reply = tokenizer.encode("😀")[:2]
    generation = generate_text(replying(reply, after=1), tokenizer, [BOS], max_new_tokens=2)
    assert list(generation) == ["\ufffd\ufffd"]


def test_a_stop_string_over_several_tokens_is_cut_exactly(tokenizer: Tokenizer) -> None:
    generation = saying("in the end user: more", tokenizer, stop_strings=["d user:", "nothing"])
    assert "".join(generation) == generation.result.text == "in the en"
    assert generation.result.reason is StopReason.STOP_STRING
    assert generation.result.new_tokens == len(tokenizer.encode("in the end user:"))


def test_an_incomplete_stop_string_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    generation = saying("in us", tokenizer, stop_strings=["user"])
    assert "".join(generation) == "in us"
    assert generation.result.reason is StopReason.STOP_TOKEN
