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
from dataclasses import dataclass, replace
from typing import Literal

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.frame import CANONICAL_TEMPLATE, ChatFrame, Languages
from gemma_runtime.text.mask import Mask
from gemma_runtime.text.template import TemplateRefusal
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import (
    GEMMA4,
    Json,
    Schema,
    ToolCall,
    call_text,
    check_tools,
    tool_prompt,
)

_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Message:
    """A turn. Only the assistant calls tools; a turn of the role `tool` has what they returned."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None  # of the tool whose result the content is
    # For templates that take {"name": …, "response": …} instead; of Gemma 4, also in the turn that
    # called the tools.
    results: tuple[Schema, ...] = ()
    thought: str = ""  # before the calls; a template keeps it until the user's next turn

    def shown(self, content: str) -> dict[str, Json]:
        """What a template sees, with this text as the content."""
        turn: dict[str, Json] = {"role": self.role, "content": content}
        if self.name is not None:
            turn["name"] = self.name
        if self.results and self.role == "tool":
            turn["content"] = list(self.results)
        elif self.results:
            turn["tool_responses"] = list(self.results)
        if self.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
            if self.thought:  # Gemma 4's first templates read only the first of these names
                turn |= {"reasoning": self.thought, "reasoning_content": self.thought}
        return turn


def encode_chat(
    tokenizer: Tokenizer,
    template: str | None,
    messages: Sequence[Message],
    bos_token: int,
    eos_token: int | None = None,
    *,
    tools: Sequence[Schema] = (),
    thinking: bool = False,
    languages: Languages | None = None,
) -> list[int]:
    """Token ids of a conversation, up to the start of the model's next turn.

    bos is where the template writes it: a template without bos gets none. `template` is Jinja with
    Hugging Face's conventions; None selects Gemma's format. `eos_token` is what the template may
    write as `eos_token`; None selects `<eos>`. If the template rejects a system turn, the system
    text is put in front of the first user turn. `tools` are JSON schemas; if the template leaves
    them out, they go into the system turn, as Gemma 3's documented prompt. `thinking` asks the
    model to think before it answers. A model that only translates needs `languages`. Raises
    TokenizerError if turns don't alternate, the template fails, or it has no thinking to turn on.
    """
    _check_turns(messages)
    frame = _frame(tokenizer, template, bos_token, eos_token)
    frame = frame.translating(languages)
    if thinking:
        frame = frame.with_thinking()
    tools = check_tools(tools)
    mask = Mask(tokenizer.control_pieces)
    if tools or any(message.tool_calls or message.role == "tool" for message in messages):
        if frame.leaves_out_tools():
            messages = _without_tools(messages, tools)
        else:
            frame = replace(frame, tools=mask.value(tools) or None)
            messages = [_masked(message, mask) for message in messages]
            if GEMMA4.call in frame.template:
                messages = in_model_turns(messages)
    rendering = _render_folded(tokenizer, frame, messages)
    ids: list[int] = []
    for part in rendering.parts:
        # The template's and the user's text between two control tokens are encoded together, as
        # transformers does, so that the ids are the same.
        ids += (
            [part] if isinstance(part, int) else tokenizer.encode(mask.fill(rendering.fill(part)))
        )
    return ids


def render_chat(
    tokenizer: Tokenizer,
    template: str | None,
    messages: Sequence[Message],
    bos_token: int,
    eos_token: int | None = None,
) -> str:
    """The conversation as text, as `encode_chat` encodes it.

    Only for display and digests: names of control tokens in the contents look like tokens.
    """
    _check_turns(messages)
    frame = _frame(tokenizer, template, bos_token, eos_token).translating(None)
    try:
        text = frame.render([message.shown(message.content) for message in messages])
        if messages[0].role not in _SYSTEM or messages[0].content.strip() in text:
            return text
    except TemplateRefusal:
        if messages[0].role not in _SYSTEM:
            raise
    return frame.render([turn.shown(turn.content) for turn in _fold_system(messages)])


def _frame(
    tokenizer: Tokenizer, template: str | None, bos_token: int, eos_token: int | None
) -> ChatFrame:
    return ChatFrame(
        template=CANONICAL_TEMPLATE if template is None else template,
        bos=_piece(tokenizer, bos_token),
        eos=_piece(tokenizer, tokenizer.token_id("<eos>") if eos_token is None else eos_token),
    )


def _piece(tokenizer: Tokenizer, token: int | None) -> str:
    """The text of a token, or "" if the vocabulary doesn't have it."""
    return "" if token is None else tokenizer.piece(token) or ""


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


def _masked(message: Message, mask: Mask) -> Message:
    calls = tuple(
        ToolCall(mask.text(call.name), mask.value(call.arguments)) for call in message.tool_calls
    )
    name = None if message.name is None else mask.text(message.name)
    results = tuple(map(mask.value, message.results))
    return replace(
        message, tool_calls=calls, name=name, results=results, thought=mask.text(message.thought)
    )


def in_model_turns(messages: Sequence[Message]) -> list[Message]:
    """Gemma 4's turns: calls, their results and what the model says to them are one turn.

    Every version of its template reads results as `tool_responses` of the turn that calls.
    """
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        if last is not None and last.tool_calls and message.role == "tool":
            turns[-1] = replace(last, results=(*last.results, *message.results))
        elif (
            last is not None
            and last.results
            and not message.tool_calls
            and (message.role == "assistant")
        ):
            content = f"{last.content}\n{message.content}".strip()
            turns[-1] = replace(last, content=content)
        else:
            turns.append(message)
    return turns


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
    if messages[0].role not in _SYSTEM:
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
    shown = [_hide(message.content, hidden) for message in messages]
    text = frame.render(
        [message.shown(text) for message, text in zip(messages, shown, strict=True)]
    )
    blind = _Rendering(list(tokenizer.split_control(text)), hidden)
    real = frame.render([message.shown(message.content) for message in messages])
    if blind.fill(text) == real:
        _check_kept(text, messages[-1].content, shown[-1])
        _check_kept(text, messages[0].content, shown[0])
        return blind
    if messages[0].role in _SYSTEM:
        _check_kept(text, messages[0].content, shown[0])
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

    text = frame.render([message.shown(mask(message.content)) for message in messages])
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
