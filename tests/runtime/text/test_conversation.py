from collections.abc import Sequence

import pytest

from gemma_runtime.errors import ContextFull, SessionError
from gemma_runtime.session import FakeSession
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.generate import TextGeneration
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS
from tests.runtime.text.scripted import END, Recording


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
