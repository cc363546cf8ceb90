"""Turns chat messages into token ids with the checkpoint's chat template.

Neither the template nor the messages are trusted. The template runs in a sandbox and sees a random
number instead of each message's content. The contents are filled in afterwards, as text that can't
become a control token.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.template import TemplateRefusal, render_template
from gemma_runtime.text.tokenizer import Tokenizer

# For checkpoints without a template: Gemma's turn format, written by us.
CANONICAL_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{ raise_exception("no system turn") }}{% endif %}
    {%- set speaker = "model" if message.role == "assistant" else "user" %}
    {{- "<start_of_turn>" + speaker + "\\n" + message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<start_of_turn>model\\n" }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


def encode_chat(
    tokenizer: Tokenizer, template: str | None, messages: Sequence[Message], bos_token: int
) -> list[int]:
    """Token ids of a conversation, up to the start of the model's next turn.

    bos comes once, at the start. `template` is Jinja with Hugging Face's conventions; None selects
    Gemma's format. If the template rejects a system turn, the system text is put in front of the
    first user turn. Raises TokenizerError if turns don't alternate or the template fails.
    """
    _check_turns(messages)
    frame = ChatFrame(
        template=CANONICAL_TEMPLATE if template is None else template,
        bos=_piece(tokenizer, bos_token),
        eos=_piece(tokenizer, tokenizer.token_id("<eos>")),
    )
    text, contents = _render_folded(frame, messages)
    ids = [bos_token]
    for part in tokenizer.split_control(text):
        if part == bos_token:
            continue
        # The template's and the user's text between two control tokens are encoded together, as
        # transformers does, so that the ids are the same.
        ids += [part] if isinstance(part, int) else tokenizer.encode(_fill(part, contents))
    return ids


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """A template, and the bos and eos pieces that it may write."""

    template: str
    bos: str
    eos: str

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """Render (role, content) turns as text, up to the start of the reply."""
        names = {
            "messages": [{"role": role, "content": content} for role, content in turns],
            "add_generation_prompt": True,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": None,
            "documents": None,
        }
        return render_template(self.template, names)


def _piece(tokenizer: Tokenizer, token: int | None) -> str:
    """The text of a control token, or "" if the vocabulary doesn't have it."""
    if token is None or token not in tokenizer.control_tokens:
        return ""
    return tokenizer.piece(token) or ""


def _check_turns(messages: Sequence[Message]) -> None:
    turns = [message.role for message in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if not turns:
        raise TokenizerError("the conversation has no user turn; begin with one")
    for index, role in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise TokenizerError(
                f"turn {index + 1} is by {role!r}, expected {expected!r}: after an optional system "
                "turn, user and assistant alternate"
            )


def _render_folded(frame: ChatFrame, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
    """Render. If the template rejects the system turn, fold it into the user turn and retry."""
    if messages[0].role != "system":
        return _render(frame, messages)
    try:
        return _render(frame, messages)
    except TemplateRefusal:
        return _render(frame, _fold_system(messages))


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    content = f"{system.content.strip()}\n\n{first.content.strip()}".strip()
    return [Message("user", content), *rest]


def _render(frame: ChatFrame, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
    """The rendered text with placeholders, and the content of each placeholder."""
    contents: dict[str, str] = {}
    text = frame.render([(m.role, _hide(m.content, contents)) for m in messages])
    for placeholder, content in contents.items():
        if placeholder not in text:
            raise TemplateRefusal(
                f"the chat template leaves out or alters {content[:40]!r}; fix the template"
            )
    return text, contents


def _hide(content: str, contents: dict[str, str]) -> str:
    """Replace the content by a placeholder, keeping its outer white space.

    The template can then trim or keep that white space. The placeholder is digits because a
    template may change the case of letters. Content that is only white space is returned as it is.
    """
    stripped = content.strip()
    if not stripped:
        return content
    placeholder = f"{secrets.randbelow(10**40):040}"
    contents[placeholder] = stripped
    left = len(content) - len(content.lstrip())
    return content[:left] + placeholder + content[left + len(stripped) :]


def _fill(text: str, contents: dict[str, str]) -> str:
    if not contents:
        return text
    return re.sub("|".join(contents), lambda match: contents[match[0]], text)
