"""Turns chat messages into token ids with the checkpoint's chat template.

Neither the template nor the messages are trusted. The template runs in a sandbox, and first sees a
random number instead of each message's content. The contents are filled in afterwards, as text that
can't become a control token. A template may depend on the contents, for example to remove thoughts
from earlier replies. So it is rendered a second time with the contents; if the texts differ, that
rendering counts, and names of control tokens in the contents stay text there too.
"""

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
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
    tokenizer: Tokenizer,
    template: str | None,
    messages: Sequence[Message],
    bos_token: int,
    eos_token: int | None = None,
) -> list[int]:
    """Token ids of a conversation, up to the start of the model's next turn.

    bos is where the template writes it: a template without bos gets none. `template` is Jinja with
    Hugging Face's conventions; None selects Gemma's format. `eos_token` is what the template may
    write as `eos_token`; None selects `<eos>`. If the template rejects a system turn, the system
    text is put in front of the first user turn. Raises TokenizerError if turns don't alternate or
    the template fails.
    """
    _check_turns(messages)
    frame = ChatFrame(
        template=CANONICAL_TEMPLATE if template is None else template,
        bos=_piece(tokenizer, bos_token),
        eos=_piece(tokenizer, tokenizer.token_id("<eos>") if eos_token is None else eos_token),
    )
    rendering = _render_folded(tokenizer, frame, messages)
    ids: list[int] = []
    for part in rendering.parts:
        # The template's and the user's text between two control tokens are encoded together, as
        # transformers does, so that the ids are the same.
        ids += [part] if isinstance(part, int) else tokenizer.encode(rendering.fill(part))
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
    """The text of a token, or "" if the vocabulary doesn't have it."""
    return "" if token is None else tokenizer.piece(token) or ""


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


@dataclass(frozen=True, slots=True)
class _Rendering:
    """A rendered conversation: control tokens, and text with placeholders between them."""

    parts: list[int | str]
    hidden: Mapping[str, str]  # placeholder -> the text that it stands for

    @property
    def control(self) -> list[int]:
        return [part for part in self.parts if isinstance(part, int)]

    def fill(self, text: str) -> str:
        if not self.hidden:
            return text
        return re.sub("|".join(self.hidden), lambda match: self.hidden[match[0]], text)


def _render_folded(
    tokenizer: Tokenizer, frame: ChatFrame, messages: Sequence[Message]
) -> _Rendering:
    """Render. If the template rejects the system turn, fold it into the user turn and retry."""
    if messages[0].role != "system":
        return _render(tokenizer, frame, messages)
    try:
        return _render(tokenizer, frame, messages)
    except TemplateRefusal:
        return _render(tokenizer, frame, _fold_system(messages))


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    content = f"{system.content.strip()}\n\n{first.content.strip()}".strip()
    return [Message("user", content), *rest]


def _render(tokenizer: Tokenizer, frame: ChatFrame, messages: Sequence[Message]) -> _Rendering:
    """The rendering with hidden contents, or the one with real contents if they differ."""
    hidden: dict[str, str] = {}
    turns = [(message.role, _hide(message.content, hidden)) for message in messages]
    text = frame.render(turns)
    blind = _Rendering(list(tokenizer.split_control(text)), hidden)
    real = frame.render([(message.role, message.content) for message in messages])
    if blind.fill(text) == real:
        _check_kept(text, messages[-1].content, turns[-1][1])
        _check_kept(text, messages[0].content, turns[0][1])
        return blind
    if messages[0].role == "system":
        _check_kept(text, messages[0].content, turns[0][1])
    return _render_real(tokenizer, frame, messages, blind)


def _check_kept(text: str, content: str, shown: str) -> None:
    if shown.strip() not in text:
        raise TemplateRefusal(f"the chat template leaves out {content[:40]!r}; fix the template")


def _render_real(
    tokenizer: Tokenizer, frame: ChatFrame, messages: Sequence[Message], blind: _Rendering
) -> _Rendering:
    """Render with the real contents, in which only names of the template's control tokens are
    hidden. Any other control token in the result is the contents' and stays text.
    """
    own = set(blind.control)
    hidden: dict[str, str] = {}

    def mask(content: str) -> str:
        parts = tokenizer.split_control(content)
        return "".join(
            _placeholder(tokenizer.piece(part) or "", hidden)
            if isinstance(part, int) and part in own
            else part
            if isinstance(part, str)
            else tokenizer.piece(part) or ""
            for part in parts
        )

    text = frame.render([(message.role, mask(message.content)) for message in messages])
    found = _Rendering(_only(tokenizer, text, own), hidden)
    if found.control != blind.control:
        raise TokenizerError(
            "the chat template adds or removes control tokens depending on a message's text; "
            "shorten the message or fix the template"
        )
    return found


def _only(tokenizer: Tokenizer, text: str, own: Collection[int]) -> list[int | str]:
    """Split `text` at these control tokens; the names of others are text."""
    parts: list[int | str] = []
    for part in tokenizer.split_control(text):
        if isinstance(part, int) and part in own:
            parts.append(part)
            continue
        piece = part if isinstance(part, str) else tokenizer.piece(part) or ""
        before = parts.pop() if parts and isinstance(parts[-1], str) else ""
        parts.append(f"{before}{piece}")
    return parts


def _hide(content: str, hidden: dict[str, str]) -> str:
    """Replace the content by a placeholder, keeping its outer white space.

    The template can then trim or keep that white space. Content that is only white space is
    returned as it is.
    """
    stripped = content.strip()
    if not stripped:
        return content
    left = len(content) - len(content.lstrip())
    return content[:left] + _placeholder(stripped, hidden) + content[left + len(stripped) :]


def _placeholder(content: str, hidden: dict[str, str]) -> str:
    """A new placeholder for this text: digits, because a template may change letters' case."""
    placeholder = f"{secrets.randbelow(10**40):040}"
    hidden[placeholder] = content
    return placeholder
