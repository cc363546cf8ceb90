"""Turns chat messages into token ids with the checkpoint's chat template.

Neither the template nor the messages are trusted. The template runs in a sandbox and sees a random
number instead of each message's content. The contents are filled in afterwards, as text that can't
become a control token.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.template import TemplateRefusal, render_template
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import Json, Schema, ToolCall, call_text, check_tools, tool_prompt

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

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Message:
    """A turn. Only the assistant calls tools; a turn of the role `tool` has what they returned."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None  # of the tool whose result the content is
    results: tuple[Schema, ...] = ()  # for templates that take {"name": …, "response": …} instead

    def shown(self, content: str) -> dict[str, Json]:
        """What a template sees, with this text as the content."""
        turn: dict[str, Json] = {"role": self.role, "content": content}
        if self.name is not None:
            turn["name"] = self.name
        if self.results:
            turn["content"] = list(self.results)
        if self.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return turn


def encode_chat(
    tokenizer: Tokenizer,
    template: str | None,
    messages: Sequence[Message],
    bos_token: int,
    *,
    tools: Sequence[Schema] = (),
) -> list[int]:
    """Token ids of a conversation, up to the start of the model's next turn.

    bos comes once, at the start. `template` is Jinja with Hugging Face's conventions; None selects
    Gemma's format. If the template rejects a system turn, the system text is put in front of the
    first user turn. `tools` are JSON schemas; if the template leaves them out, they go into the
    system turn, as Gemma 3's documented prompt. Raises TokenizerError if turns don't alternate or
    the template fails.
    """
    _check_turns(messages)
    frame = ChatFrame(
        template=CANONICAL_TEMPLATE if template is None else template,
        bos=_piece(tokenizer, bos_token),
        eos=_piece(tokenizer, tokenizer.token_id("<eos>")),
    )
    tools = check_tools(tools)
    mask = _Mask(tokenizer)
    if tools or any(message.tool_calls or message.role == "tool" for message in messages):
        if frame.leaves_out_tools():
            messages = _without_tools(messages, tools)
        else:
            frame = replace(frame, tools=mask.value(tools) or None)
            messages = [mask.message(message) for message in messages]
    text, contents = _render_folded(frame, messages)
    ids = [bos_token]
    for part in tokenizer.split_control(text):
        if part == bos_token:
            continue
        # The template's and the user's text between two control tokens are encoded together, as
        # transformers does, so that the ids are the same.
        ids += (
            [part]
            if isinstance(part, int)
            else tokenizer.encode(_fill(_fill(part, contents), mask.hidden))
        )
    return ids


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """A template, and the bos and eos pieces that it may write."""

    template: str
    bos: str
    eos: str
    tools: list[Schema] | None = None

    def render(self, turns: Sequence[tuple[str, str] | dict[str, Json]]) -> str:
        """Render turns, as (role, content) or whole, as text, up to the start of the reply."""
        names = {
            "messages": [
                turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]}
                for turn in turns
            ],
            "add_generation_prompt": True,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": self.tools,
            "documents": None,
        }
        return render_template(self.template, names)

    def leaves_out_tools(self) -> bool:
        """Whether the template writes the same text with tools as without."""
        function = {"name": "f", "description": "f", "parameters": {"type": "object"}}
        probe = replace(self, tools=[{"type": "function", "function": function}])
        try:
            return probe.render([("user", "0")]) == self.render([("user", "0")])
        except TokenizerError:
            return False  # it reads the tools, or wants another conversation


def _piece(tokenizer: Tokenizer, token: int | None) -> str:
    """The text of a control token, or "" if the vocabulary doesn't have it."""
    if token is None or token not in tokenizer.control_tokens:
        return ""
    return tokenizer.piece(token) or ""


def _check_turns(messages: Sequence[Message]) -> None:
    turns = messages[1:] if messages and messages[0].role in _SYSTEM else messages
    if not turns:
        raise TokenizerError("the conversation has no user turn; begin with one")
    expected = ["user"]
    for index, message in enumerate(turns):
        if message.role not in expected:
            raise TokenizerError(
                f"turn {index + 1} is by {message.role!r}, expected {expected[0]!r}: after an "
                "optional system turn, user and assistant alternate"
            )
        if message.role == "user":
            expected = ["assistant"]
        elif message.role == "tool":
            expected = ["assistant", "tool"]
        else:
            expected = ["tool", "user"] if message.tool_calls else ["user"]


def _without_tools(messages: Sequence[Message], tools: Sequence[Schema]) -> list[Message]:
    """The conversation as text: tools in the system turn, calls and results as JSON.

    Google's examples for Gemma put results into blocks fenced as `tool_output`.
    """
    turns: list[Message] = []
    if tools:
        system = messages[0].content if messages[0].role in _SYSTEM else ""
        turns.append(Message("system", f"{system}\n\n{tool_prompt(tools)}".strip()))
        messages = messages[1:] if messages[0].role in _SYSTEM else messages
    for message in messages:
        if message.tool_calls:
            content = f"{message.content}\n{call_text(message.tool_calls)}".strip()
            turns.append(Message("assistant", content))
            continue
        if message.role != "tool":
            turns.append(message)
            continue
        content = f"```tool_output\n{message.content}\n```"
        if turns[-1].role == "user":  # the results of several calls are one turn
            content = f"{turns.pop().content}\n{content}"
        turns.append(Message("user", content))
    return turns


class _Mask:
    """Hides what could become a control token in the strings of tools, calls and results.

    Templates look at these strings, for example at types, so a whole one can't be hidden. Of each
    control token the first and last character is enough.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.hidden: dict[str, str] = {}  # placeholder -> what it stands for
        self._placeholders: dict[str, str] = {}
        self._pieces = tokenizer.control_pieces

    def message(self, message: Message) -> Message:
        calls = tuple(
            ToolCall(self._text(call.name), self.value(call.arguments))
            for call in message.tool_calls
        )
        results = tuple(map(self.value, message.results))
        name = None if message.name is None else self._text(message.name)
        return replace(message, tool_calls=calls, name=name, results=results)

    def value(self, value: Json) -> Json:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self._text(str(key)): self.value(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        return value

    def _text(self, text: str) -> str:
        text = self._pattern.sub(lambda match: self._placeholder(match[0]), text)
        if text.strip().casefold() in self._names:  # between the template's brackets
            text = text.rstrip()
            text = text[:-1] + self._placeholder(text[-1])
        return text

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        edges = {edge for piece in self._pieces for edge in (piece[0], piece[-1])}
        worded = [piece for piece in self._pieces if piece[0].isalnum() or piece[-1].isalnum()]
        single = sorted(edge for edge in edges if not edge.isalnum())
        return re.compile("|".join(map(re.escape, [*worded, *single])) or "(?!)")

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(re.sub(r"^\W+|\W+$", "", piece).casefold() for piece in self._pieces)

    def _placeholder(self, text: str) -> str:
        if text not in self._placeholders:
            placeholder = f"{secrets.randbelow(10**40):040}"
            self._placeholders[text] = placeholder
            self.hidden[placeholder] = text
        return self._placeholders[text]


def _render_folded(frame: ChatFrame, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
    """Render. If the template rejects the system turn, fold it into the user turn and retry."""
    if messages[0].role not in _SYSTEM:
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
    text = frame.render([m.shown(_hide(m.content, contents)) for m in messages])
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
