"""A chat that goes on when the context is full."""

from pathlib import Path

import pytest

from gemma_runtime.bundle import open_bundle
from gemma_runtime.errors import ContextFull
from gemma_runtime.session import open_session
from gemma_runtime.text.chat import encode_chat
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.generate import generate_text
from gemma_runtime.text.tokenizer import load_tokenizer

TINY = open_bundle(Path(__file__).parents[1] / "data" / "tiny")
QUESTIONS = [f"the user in the inn {index}" for index in range(6)]


@pytest.mark.parametrize("system", [None, "be brief"])
def test_after_rolling_each_reply_is_that_of_a_new_session_with_the_kept_turns(
    system: str | None,
) -> None:
    tokenizer, manifest = load_tokenizer(TINY), TINY.manifest
    with open_session(TINY, threads=1) as session, open_session(TINY, threads=1) as fresh:
        chat = Conversation(
            session,
            tokenizer,
            template=manifest.chat_template,
            bos_token=manifest.bos_token,
            stop_tokens=manifest.stop_tokens,
            system=system,
            roll=True,
        )
        for question in QUESTIONS:
            reply = "".join(chat.send(question, max_new_tokens=6))
            kept = chat.messages[:-1]
            prompt = encode_chat(tokenizer, manifest.chat_template, kept, manifest.bos_token)
            fresh.reset()
            expected = generate_text(
                fresh,
                tokenizer,
                prompt,
                max_new_tokens=6,
                stop_tokens=manifest.stop_tokens,
            )
            assert reply == "".join(expected)
        assert chat.forgotten > 0
        assert [m.content for m in chat.messages if m.role == "system"] == [system][: bool(system)]
        with pytest.raises(ContextFull):
            chat.send("the " * 200)
