"""Messages to token ids, by the checkpoint's chat template.

A template is untrusted, and so is what users write. The template runs in a sandbox and sees a
random number in place of each content; contents come in afterwards, as text that can't become a
control token.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.template import TemplateRefusal, render_template
from gemma_runtime.text.tokenizer import Tokenizer

# For checkpoints that come without one: Gemma's turns, in our words.
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
    """Ids of a conversation, up to where the model's next turn begins; bos once, in front.

    `template` is Jinja with Hugging Face's conventions; None is Gemma's own. Where it knows no
    system turn, the system's text opens the first user turn. Raises TokenizerError for turns that
    don't alternate and for a template that fails.
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
        # Between two markers the template's words and the user's are encoded as one text, as
        # they would be without the wall: ids are those of transformers.
        ids += [part] if isinstance(part, int) else tokenizer.encode(_fill(part, contents))
    return ids


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """A template and the names of the tokens that it writes."""

    template: str
    bos: str
    eos: str

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) turns, up to where the reply begins."""
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
    """How a template writes a control token; nothing if the vocabulary has no such token."""
    if token is None or token not in tokenizer.control_tokens:
        return ""
    return tokenizer.piece(token) or ""


def _check_turns(messages: Sequence[Message]) -> None:
    turns = [message.role for message in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if not turns:
        raise TokenizerError("the conversation has no user turn; begin with one")
    for place, role in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            raise TokenizerError(
                f"turn {place + 1} is by {role!r}, expected {expected!r}: after an optional system "
                "turn, user and assistant alternate"
            )


def _render_folded(frame: ChatFrame, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
    """Render; once more with the system's text in the user's turn, if the template has no place."""
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
    """The template's text with placeholders, and what they stand for."""
    contents: dict[str, str] = {}
    text = frame.render([(m.role, _hide(m.content, contents)) for m in messages])
    for hidden, content in contents.items():
        if hidden not in text:
            raise TemplateRefusal(
                f"the chat template leaves out or alters {content[:40]!r}; change it"
            )
    return text, contents


def _hide(content: str, contents: dict[str, str]) -> str:
    """A placeholder in the content's own white space, so that the template trims or keeps that.

    Digits, because no change of case alters them. Nothing can be hidden in white space alone.
    """
    stripped = content.strip()
    if not stripped:
        return content
    hidden = f"{secrets.randbelow(10**40):040}"
    contents[hidden] = stripped
    left = len(content) - len(content.lstrip())
    return content[:left] + hidden + content[left + len(stripped) :]


def _fill(text: str, contents: dict[str, str]) -> str:
    if not contents:
        return text
    return re.sub("|".join(contents), lambda match: contents[match[0]], text)
