from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import ContextFull, SessionError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.generate import (
    Conversation,
    StopReason,
    StopStrings,
    TextGeneration,
    generate,
    generate_text,
)
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS

VOCABULARY = 400
END = 5  # <end_of_turn>
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


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


def one_hot(token: int) -> Logits:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token] = 1
    return logits


def counting(context_length: int = 4096) -> FakeSession:
    """A session that continues each token with the next larger id."""
    return FakeSession(lambda tokens: one_hot(tokens[-1] + 1), context_length)


class Recording(FakeSession):
    """A session with one reply per prompt; records the prompts and counts the resets."""

    def __init__(
        self,
        replies: Sequence[Sequence[int]],
        context_length: int = 4096,
        slack: int | None = None,
    ) -> None:
        super().__init__(self._next, context_length, slack)
        self._replies = [list(reply) for reply in replies]
        self._start = 0  # position of the current reply's first token
        self.prompts: list[list[int]] = []
        self.resets = 0

    def prefill(self, tokens: Sequence[int]) -> Logits:
        if len(tokens) > 1:
            self.prompts.append(list(tokens))
            self._start = self.position + len(tokens)
        return super().prefill(tokens)

    def reset(self) -> None:
        self.resets += 1
        super().reset()

    def _next(self, tokens: Sequence[int]) -> Logits:
        reply = self._replies[len(self.prompts) - 1]
        index = max(0, len(tokens) - self._start)
        return one_hot(reply[index] if index < len(reply) else END)


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


@given(pieces=st.lists(st.text("abc", max_size=4), max_size=8), stops=STOPS)
def test_text_is_cut_before_the_stop_string_that_ends_first(
    pieces: list[str], stops: list[str]
) -> None:
    filtered = StopStrings(stops)
    shown = "".join(filtered.push(piece) for piece in pieces)
    assert shown + filtered.flush() == _by_definition("".join(pieces), stops)


@given(text=st.text("abc", max_size=12), stops=STOPS)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(
    text: str, stops: list[str]
) -> None:
    filtered = StopStrings(stops)
    shown = "".join(filtered.push(character) for character in text)
    held = filtered.flush()
    if filtered.found:
        assert held == ""
    else:
        assert shown + held == text
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(
            stop.startswith(text[start:]) for start in range(len(shown)) for stop in stops
        )


def _by_definition(text: str, stops: list[str]) -> str:
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SessionError, match="stop string is empty"):
        StopStrings(["a", ""])


def test_a_turn_feeds_only_what_the_cache_lacks(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("the"), tokenizer.encode("user")])
    chat = talk(session, tokenizer)
    resets = session.resets
    assert say(chat, "in") == "the"
    assert say(chat, "us") == "user"
    assert session.resets == resets
    second = "<end_of_turn>\n<start_of_turn>user\nus<end_of_turn>\n<start_of_turn>model\n"
    assert session.prompts[1] == tokenizer.encode(second, control=True)
    assert chat.messages == [
        Message("user", "in"),
        Message("assistant", "the"),
        Message("user", "us"),
        Message("assistant", "user"),
    ]


def test_after_a_reply_that_the_template_trims_only_what_follows_it_is_fed(
    tokenizer: Tokenizer,
) -> None:
    session = Recording([tokenizer.encode("the\n"), tokenizer.encode("user")])
    chat = talk(session, tokenizer)
    say(chat, "in")
    say(chat, "us")
    fed = tokenizer.decode(session.prompts[1], control=True)
    assert fed.startswith("<end_of_turn>\n<start_of_turn>user\nus")
    assert tokenizer.decode(session.tokens).startswith("user\nin\nmodel\nthe\nuser\nus")


def test_caches_that_can_not_go_back_are_fed_again_from_the_last_reply(
    tokenizer: Tokenizer,
) -> None:
    """From the start once; from then on the session holds a mark before each reply."""
    session = Recording([tokenizer.encode("the\n")] * 3, slack=0)
    chat = talk(session, tokenizer)
    for turn in ("in", "us", "er"):
        say(chat, turn)
        expected = encode_chat(tokenizer, None, chat.messages[:-1], BOS)
        assert session.tokens == [*expected, *tokenizer.encode("the\n")]
    assert session.prompts[1][0] == BOS
    assert tokenizer.decode(session.prompts[2]) == "the\nuser\ner\nmodel\n"


def test_the_last_token_of_a_reply_cut_by_its_length_is_fed_with_the_next_turn(
    tokenizer: Tokenizer,
) -> None:
    session = Recording([tokenizer.encode("the"), tokenizer.encode("user")])
    chat = talk(session, tokenizer)
    resets = session.resets
    assert "".join(chat.send("in", max_new_tokens=1)) == "the"
    say(chat, "us")
    assert session.resets == resets
    assert session.prompts[1][:2] == tokenizer.encode("the<end_of_turn>", control=True)


def test_a_stop_string_is_not_fed_in_the_next_turn(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("in STOP"), tokenizer.encode("user")])
    chat = talk(session, tokenizer, stop_strings=["STOP"])
    say(chat, "in")
    say(chat, "us")
    assert "STOP" not in tokenizer.decode(session.tokens)


def test_an_interrupted_reply_counts_with_its_text_so_far(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("user in"), tokenizer.encode("er")])
    chat = talk(session, tokenizer)
    reply = chat.send("us")
    assert next(iter(reply)) == "user"
    assert say(chat, "in") == "er"
    assert [message.content for message in chat.messages] == ["us", "user", "in", "er"]
    fed = list(session.tokens)
    assert list(reply) == []
    assert session.tokens == fed


def test_a_turn_whose_reply_is_never_iterated_is_dropped(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("er")])
    chat = talk(session, tokenizer)
    chat.send("us")
    assert say(chat, "in") == "er"
    assert [message.content for message in chat.messages] == ["in", "er"]


def test_a_turn_that_does_not_fit_leaves_the_conversation_unchanged(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("the"), tokenizer.encode("er")], context_length=60)
    chat = talk(session, tokenizer)
    say(chat, "in")
    position = session.position
    with pytest.raises(ContextFull, match="start a new one"):
        chat.send("x" * 60)
    assert session.position == position
    assert say(chat, "us") == "er"


def test_a_turn_of_no_tokens_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SessionError, match="max_new_tokens is 0"):
        talk(Recording([]), tokenizer).send("in", max_new_tokens=0)


def test_a_reset_keeps_the_system_turn(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("the"), tokenizer.encode("er")])
    chat = talk(session, tokenizer, system="in")
    say(chat, "us")
    chat.reset()
    assert session.position == 0
    assert chat.messages == [Message("system", "in")]
    say(chat, "user")
    assert tokenizer.decode(session.tokens) == "user\nin\n\nuser\nmodel\ner"


def test_tokens_fed_by_other_callers_do_not_count_as_the_conversation(
    tokenizer: Tokenizer,
) -> None:
    session = Recording([tokenizer.encode("the"), tokenizer.encode("er")])
    chat = talk(session, tokenizer)
    session.score([7, 7, 7])
    assert say(chat, "in") == "the"
    assert session.tokens[0] == BOS


def test_a_rolling_chat_forgets_the_oldest_turns_but_never_the_system_turn(
    tokenizer: Tokenizer,
) -> None:
    session = Recording([tokenizer.encode("the inn")] * 8, context_length=128)
    chat = talk(session, tokenizer, system="be brief", roll=True)
    for turn in range(8):
        say(chat, f"question {turn}")
    assert chat.forgotten > 0
    assert chat.forgotten % 2 == 0
    assert len(chat.messages) == 1 + 16 - chat.forgotten
    assert [chat.messages[0].content, chat.messages[-2].content] == ["be brief", "question 7"]


def test_after_rolling_the_reply_is_that_of_a_new_chat_with_the_kept_turns(
    tokenizer: Tokenizer,
) -> None:
    session = Recording([tokenizer.encode("the inn")] * 8, context_length=96)
    chat = talk(session, tokenizer, roll=True)
    for turn in range(8):
        say(chat, f"question {turn}")
    fresh = encode_chat(tokenizer, None, chat.messages[:-1], BOS)
    assert session.tokens[: len(fresh)] == fresh
    assert session.tokens[len(fresh) :] == tokenizer.encode("the inn")


def test_a_single_turn_longer_than_the_context_is_refused_by_a_rolling_chat_too(
    tokenizer: Tokenizer,
) -> None:
    session = Recording([tokenizer.encode("the inn")] * 3, context_length=64)
    chat = talk(session, tokenizer, roll=True)
    say(chat, "question")
    before = chat.messages
    with pytest.raises(ContextFull, match="shorten the message"):
        chat.send("more " * 60)
    assert (chat.messages, chat.forgotten) == (before, 0)
    assert say(chat, "in") == "the inn"


def test_a_chat_forgets_nothing_while_its_turns_fit(tokenizer: Tokenizer) -> None:
    session = Recording([tokenizer.encode("the inn")] * 3, context_length=256)
    chat = talk(session, tokenizer, roll=True)
    for turn in range(3):
        say(chat, f"question {turn}")
    assert (chat.forgotten, len(chat.messages)) == (0, 6)


def talk(
    session: FakeSession,
    tokenizer: Tokenizer,
    stop_strings: Sequence[str] = (),
    system: str | None = None,
    roll: bool = False,
) -> Conversation:
    return Conversation(
        session,
        tokenizer,
        template=None,
        bos_token=BOS,
        stop_tokens=[1, END],
        stop_strings=stop_strings,
        system=system,
        roll=roll,
    )


def say(chat: Conversation, content: str) -> str:
    reply: TextGeneration = chat.send(content)
    return "".join(reply)
