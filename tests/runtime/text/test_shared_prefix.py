from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import ContextFull, SessionError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.shared_prefix import common_length, feed, keep_beginning

LISTS = st.lists(st.integers(0, 2), max_size=12)


class Recording(FakeSession):
    """Its logits tell the tokens so far; records the calls."""

    def __init__(self, slack: int | None = None) -> None:
        super().__init__(lambda tokens: np.array([*tokens, *[-1] * (16 - len(tokens))]), 16, slack)
        self.calls: list[list[int]] = []

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self.calls.append(list(tokens))
        return super().prefill(tokens)


def told(logits: Logits) -> list[int]:
    return [int(token) for token in logits if token >= 0]


def test_only_what_follows_the_common_beginning_is_fed() -> None:
    session = Recording()
    for tokens in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6]):
        assert told(feed(session, tokens)) == tokens
    assert session.calls == [[1, 2, 3, 4], [5], [6]]


def test_the_last_token_is_fed_again_for_its_logits() -> None:
    session = Recording()
    feed(session, [1, 2, 3, 4])
    assert told(feed(session, [1, 2, 3, 4])) == [1, 2, 3, 4]
    assert told(feed(session, [1, 2])) == [1, 2]
    assert session.calls[1:] == [[4], [2]]


def test_calls_end_at_multiples_of_the_chunk_whatever_the_session_held() -> None:
    session = Recording()
    feed(session, [1, 2, 3, 4, 5, 6, 7], chunk=3)
    feed(session, [1, 2, 3, 4, 5, 6, 8, 9], chunk=3)
    feed(session, [1, 2, 3, 4, 5, 6], chunk=3)
    assert session.calls == [[1, 2, 3], [4, 5, 6], [7], [8, 9], [4, 5, 6]]


def test_tokens_that_others_fed_are_known() -> None:
    session = Recording()
    session.score([1, 2, 9])
    assert told(feed(session, [1, 2, 3])) == [1, 2, 3]
    assert session.calls == [[3]]


@given(lists=st.lists(LISTS.filter(len), max_size=6), slack=st.integers(0, 12), data=st.data())
def test_the_session_ends_with_the_tokens_whatever_it_can_go_back_to(
    lists: list[list[int]], slack: int, data: st.DataObject
) -> None:
    session, marks = Recording(slack), []
    for tokens in lists:
        chunk = data.draw(st.none() | st.integers(1, 5))
        assert told(feed(session, tokens, chunk)) == tokens == session.tokens
        if data.draw(st.booleans()):
            marks.append(session.hold())


@given(held=LISTS, tokens=LISTS, most=st.integers(0, 12), slack=st.integers(0, 12))
def test_what_is_kept_is_a_beginning_of_the_tokens(
    held: list[int], tokens: list[int], most: int, slack: int
) -> None:
    session = Recording(slack)
    if held:
        session.score(held)
    length = keep_beginning(session, tokens, most, multiple=2)
    assert session.tokens == tokens[:length] == held[:length]
    assert length % 2 == 0
    assert length <= most


def test_the_common_length_ends_at_the_first_difference() -> None:
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 4]) == 2
    assert common_length([], [1]) == 0


def test_bad_input_is_refused() -> None:
    session = Recording()
    with pytest.raises(SessionError, match="no tokens given"):
        feed(session, [])
    with pytest.raises(SessionError, match="chunks of -1; give at least 1"):
        feed(session, [1, 2], chunk=-1)
    with pytest.raises(ContextFull, match="17 more"):
        feed(session, [1] * 17)
