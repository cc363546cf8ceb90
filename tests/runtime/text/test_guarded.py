"""A conversation that a guard watches: what it stops is neither shown nor remembered."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.session import FakeSession, Logits, open_session
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.generate import Generation
from gemma_runtime.text.guarded import GuardedConversation, Withheld
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer
from tests.runtime.conftest import BOS
from tests.runtime.real_bundles import export_random


class Rules:
    """An app's own guard; records what it sees."""

    threshold = 0.5

    def __init__(self, judge: Callable[[str, str | None], float]) -> None:
        self._judge = judge
        self.seen: list[tuple[str, str | None]] = []

    def check(self, prompt: str, reply: str | None = None) -> Mapping[str, float]:
        self.seen.append((prompt, reply))
        return {"rule": self._judge(prompt, reply)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    folder = tmp_path_factory.mktemp("guarded") / "export"
    return export_random(folder, tokenizer_path, context_length=128)


@pytest.fixture
def chat(bundle: Bundle) -> Iterator[Conversation]:
    manifest = bundle.manifest
    with open_session(bundle) as session:
        yield Conversation(
            session,
            load_tokenizer(bundle),
            template=None,
            bos_token=manifest.bos_token,
            stop_tokens=manifest.stop_tokens,
        )


def text(reply: Generation | Withheld) -> str:
    assert isinstance(reply, Generation)
    return reply.text


def test_a_stopped_prompt_never_reaches_the_model(chat: Conversation) -> None:
    guard = Rules(lambda prompt, reply: float("bad" in prompt))
    guarded = GuardedConversation(chat, guard)
    expected = text(guarded.send("the user", 4))

    assert guarded.send("a bad one", 4) == Withheld("prompt", {"rule": 1.0})

    assert [message.content for message in chat.messages] == ["the user", expected]
    assert guard.seen[-1] == ("a bad one", None)


def test_after_a_stopped_reply_the_chat_goes_on_as_if_the_turn_had_not_been(
    chat: Conversation,
) -> None:
    allowed = GuardedConversation(chat, Rules(lambda prompt, reply: 0.0))
    expected = [text(allowed.send(turn, 4)) for turn in ("the user", "the ring")]
    chat.reset()

    stopping = Rules(lambda prompt, reply: float(prompt == "other" and reply is not None))
    guarded = GuardedConversation(chat, stopping)
    first = text(guarded.send("the user", 4))
    assert isinstance(withheld := guarded.send("other", 4), Withheld)
    assert withheld.withheld == "reply"
    assert [first, text(guarded.send("the ring", 4))] == expected
    assert len(chat.messages) == 4


def test_a_guard_that_fails_shows_nothing_and_the_turn_is_forgotten(chat: Conversation) -> None:
    def fail(prompt: str, reply: str | None) -> float:
        if reply is not None:
            raise SessionError("too long")
        return 0.0

    with pytest.raises(SessionError, match="too long"):
        GuardedConversation(chat, Rules(fail)).send("the user", 4)
    assert chat.messages == []


def test_calls_of_tools_and_their_results_are_checked_too(tokenizer: Tokenizer) -> None:
    reply = tokenizer.encode('[{"name": "f", "arguments": {"x": "evil"}}]')

    class Calling(FakeSession):
        """Calls the tool after each prompt."""

        def __init__(self) -> None:
            super().__init__(self._next)
            self._start = 0

        def prefill(self, tokens: Sequence[int]) -> Logits:
            if len(tokens) > 1:
                self._start = self.position + len(tokens)
            return super().prefill(tokens)

        def _next(self, tokens: Sequence[int]) -> Logits:
            said = len(tokens) - self._start
            logits = np.zeros(400, np.float32)
            logits[reply[said] if 0 <= said < len(reply) else 1] = 1
            return logits

    conversation = Conversation(
        Calling(),
        tokenizer,
        template=None,
        bos_token=BOS,
        stop_tokens=[1],
        tools=[{"name": "f"}],
    )
    guard = Rules(lambda prompt, reply: 0.0)
    guarded = GuardedConversation(conversation, guard)
    assert text(guarded.send("the user")) == ""
    assert guard.seen[-1] == ("the user", '[{"name":"f","arguments":{"x":"evil"}}]')
    guarded.send_results([{"page": "evil"}], 3)
    assert guard.seen[-2] == ('[{"page":"evil"}]', None)


def test_without_a_reply_there_is_nothing_to_take_back(chat: Conversation) -> None:
    chat.take_back()
    assert chat.messages == []
    list(chat.send("the user", 2))
    chat.take_back()
    chat.take_back()
    assert chat.messages == []
