"""What a model writes for itself before its answer is told from the answer."""

from collections.abc import Sequence

import numpy as np
import pytest

from gemma_runtime.errors import TokenizerError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.constraint import Constraint
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS, gemma4_tokenizer

TEMPLATE = """\
{{ bos_token }}{% if enable_thinking %}{{ '<|turn>system\\n<|think|>\\n<turn|>\\n' }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<|turn>' + role + '\\n' + m.content | trim + '<turn|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"""
START, END = "<|turn>model\n", "<turn|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("gemma4") / "tokenizer.json"
    gemma4_tokenizer().save(str(path))
    return Tokenizer(path)


def saying(tokenizer: Tokenizer, reply: str, after: str = START) -> FakeSession:
    """A session that says this text, with its control tokens, after the last such prompt."""
    script = tokenizer.encode(reply + END, control=True)
    start = tokenizer.encode(after, control=True)

    def next_logits(tokens: Sequence[int]) -> Logits:
        places = range(len(tokens))
        begun = max((i for i in places if list(tokens[i : i + len(start)]) == start), default=0)
        said = max(0, len(tokens) - begun - len(start))
        logits = np.zeros(tokenizer.vocabulary_size, np.float32)
        logits[script[min(said, len(script) - 1)]] = 1
        return logits

    return FakeSession(next_logits)


# Gemma 4's does so after the results of tools.
OPENS = TEMPLATE.replace("'<|turn>model\\n'", "'<|turn>model\\n<|channel>thought\\n'")


def talk(
    session: FakeSession, tokenizer: Tokenizer, thinking: bool = False, template: str = TEMPLATE
) -> Conversation:
    end = tokenizer.token_id(END)
    assert end is not None
    return Conversation(
        session,
        tokenizer,
        template=template,
        bos_token=BOS,
        stop_tokens=[end],
        thinking=thinking,
    )


def test_a_thought_is_not_part_of_the_reply_nor_of_later_turns(tokenizer: Tokenizer) -> None:
    session = saying(tokenizer, "<|channel>thought\nin the<channel|>user")
    chat = talk(session, tokenizer)
    for _ in range(2):
        reply = chat.send("us")
        assert "".join(reply) == "user"
        assert (reply.result.text, reply.result.thought) == ("user", "in the")
    assert [m.content for m in chat.messages] == ["us", "user", "us", "user"]
    # The session has just thought again; the first thought is gone.
    assert tokenizer.decode(session.tokens, control=True).count("<|channel>") == 1


def test_a_thought_that_a_limit_cuts_leaves_no_answer(tokenizer: Tokenizer) -> None:
    cut = "<|channel>thought\nin the"
    limit = len(tokenizer.encode(cut, control=True))
    reply = talk(saying(tokenizer, cut), tokenizer).send("us", limit)
    assert "".join(reply) == ""
    assert not reply.result.complete
    assert reply.result.thought == "in the"


def test_half_a_character_at_the_end_of_a_thought_is_the_thought_s(tokenizer: Tokenizer) -> None:
    """It was shown as the answer."""
    cut = "<|channel>thought\nin é"
    limit = len(tokenizer.encode(cut, control=True)) - 1
    reply = talk(saying(tokenizer, cut), tokenizer).send("us", limit)
    assert "".join(reply) == ""
    assert reply.result.thought == "in \ufffd"


def test_a_reply_without_a_channel_has_no_thought(tokenizer: Tokenizer) -> None:
    reply = talk(saying(tokenizer, "the user"), tokenizer).send("us")
    assert "".join(reply) == "the user"
    assert reply.result.thought == ""


def test_thinking_is_asked_for_in_the_template(tokenizer: Tokenizer) -> None:
    plain, thinks = (
        encode_chat(tokenizer, TEMPLATE, [Message("user", "us")], BOS, thinking=thinking)
        for thinking in (False, True)
    )
    token = tokenizer.token_id("<|think|>")
    assert token in thinks
    assert token not in plain
    session = saying(tokenizer, "the")
    list(talk(session, tokenizer, thinking=True).send("us"))
    assert token in session.tokens


def test_a_template_that_can_not_ask_for_thinking_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="knows no `enable_thinking`"):
        encode_chat(
            tokenizer,
            TEMPLATE.replace("enable_thinking", "false"),
            [Message("user", "us")],
            BOS,
            thinking=True,
        )


def test_a_thought_that_the_template_begins_is_not_part_of_the_reply(tokenizer: Tokenizer) -> None:
    session = saying(tokenizer, "thought\nin the<channel|>user", after="<|channel>")
    reply = talk(session, tokenizer, template=OPENS).send("us")
    assert "".join(reply) == "user"
    assert reply.result.thought == "in the"


@pytest.mark.parametrize(
    ("template", "after", "said", "thinking"),
    [
        (OPENS, "<|channel>", "thought\nin the<channel|>us", False),
        (TEMPLATE, START, "<|channel>thought\nin the<channel|>us", True),
        (TEMPLATE, START, "us", True),
    ],
    ids=["begun", "free", "none"],
)
def test_a_constraint_holds_what_follows_a_thought(
    tokenizer: Tokenizer, template: str, after: str, said: str, thinking: bool
) -> None:
    pytest.importorskip("llguidance")
    chat = talk(saying(tokenizer, said, after=after), tokenizer, thinking, template)
    reply = chat.send("us", constraint=Constraint.choice(["us", "use"]))
    assert "".join(reply) == "us"
    assert reply.result.complete
    assert reply.result.thought == ("in the" if "in the" in said else "")


def test_a_constrained_reply_does_not_end_within_a_thought(tokenizer: Tokenizer) -> None:
    """The stop token would leave an answer that is no JSON, and looks complete."""
    pytest.importorskip("llguidance")
    chat = talk(saying(tokenizer, "thought\nin", after="<|channel>"), tokenizer, template=OPENS)
    reply = chat.send("us", 20, Constraint.choice(["us"]))
    assert "".join(reply) == ""
    assert not reply.result.complete


def test_a_constraint_leaves_no_thought_that_nobody_asked_for(tokenizer: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    session = saying(tokenizer, "<|channel>thought\nin the<channel|>us")
    reply = talk(session, tokenizer).send("us", constraint=Constraint.choice(["us"]))
    assert "".join(reply) == "us"
    assert reply.result.thought == ""
