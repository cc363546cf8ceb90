"""Messages to token ids, by the checkpoint's chat template.

A template is untrusted, and so is what users write. The template runs in a sandbox and sees a
random number in place of each content; contents come in afterwards, as text that can't become a
control token.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_runtime.errors import TokenizerError
from gemma_runtime.tokenizer import Tokenizer

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

# What an expression in a template can raise. Jinja wraps none of them.
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


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
    frame = _Frame(
        template=CANONICAL_TEMPLATE if template is None else template,
        bos=_piece(tokenizer, bos_token),
        eos=_piece(tokenizer, tokenizer.token_id("<eos>")),
    )
    text, contents = _render_folded(frame, messages)
    ids: list[int] = []
    for part in tokenizer.split_control(text):
        # Between two markers the template's words and the user's are encoded as one text, as
        # they would be without the wall: ids are those of transformers.
        ids += [part] if isinstance(part, int) else tokenizer.encode(_fill(part, contents))
    return [bos_token, *(token for token in ids if token != bos_token)]


@dataclass(frozen=True, slots=True)
class _Frame:
    template: str
    bos: str
    eos: str


class _Refusal(TokenizerError):
    """The template knows no such conversation."""


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


def _render_folded(frame: _Frame, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
    """Render; once more with the system's text in the user's turn, if the template has no place."""
    if messages[0].role != "system":
        return _render(frame, messages)
    try:
        return _render(frame, messages)
    except _Refusal:
        return _render(frame, _fold_system(messages))


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    content = f"{system.content.strip()}\n\n{first.content.strip()}".strip()
    return [Message("user", content), *rest]


def _render(frame: _Frame, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
    """The template's text with placeholders, and what they stand for."""
    contents: dict[str, str] = {}
    turns = [{"role": m.role, "content": _hide(m.content, contents)} for m in messages]
    names = {"bos_token": frame.bos, "eos_token": frame.eos, "tools": None, "documents": None}
    try:
        template = _environment().from_string(frame.template)
        text = template.render(names, messages=turns, add_generation_prompt=True)
    except _FAULTS as error:
        raise TokenizerError(
            f"the chat template fails: {type(error).__name__}: {_one_line(error)}; "
            "fix it in the checkpoint and export again"
        ) from error
    for hidden, content in contents.items():
        if hidden not in text:
            raise _Refusal(f"the chat template leaves out or alters {content[:40]!r}; change it")
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


def _environment() -> ImmutableSandboxedEnvironment:
    """Hugging Face's: see transformers' chat_template_utils."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(f"the chat template refuses the conversation: {_one_line(message)}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]
