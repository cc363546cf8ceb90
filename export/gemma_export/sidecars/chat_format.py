"""Reduces a chat template to the fixed texts between turns, for phones, which have no Jinja.

The texts are rendered with the template itself. They are accepted only if they reproduce its output
for a set of test conversations.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations

from gemma_export.sidecars.chat_texts import ChatFormat
from gemma_export.sidecars.tool_format import tool_format
from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.frame import CANONICAL_TEMPLATE, ChatFrame
from gemma_runtime.text.template import TemplateRefusal

_USER, _REPLY, _USER_2, _SYSTEM = (f"{index}{'7' * 38}{index}" for index in range(4))
_PAD = " \n"
_LITERAL = re.compile(r"""'([^'\\\n]{2,60})'|"([^"\\\n]{2,60})\"""")


def chat_format(template: str | None, bos: str, eos: str) -> ChatFormat:
    """The format of a template. Raises TokenizerError if fixed texts can't reproduce it."""
    frame = ChatFrame(CANONICAL_TEMPLATE if template is None else template, bos, eos)
    frame = frame.translating(None)
    result = _format_of(frame)
    try:
        thinks = frame.with_thinking()
    except TokenizerError:
        return result
    return replace(result, thinking=_format_of(thinks))


def _format_of(frame: ChatFrame) -> ChatFormat:
    turns = [("user", _USER), ("assistant", _REPLY), ("user", _USER_2)]
    first, user_to_assistant, assistant_to_user, reply = _texts_between(frame, turns)
    fold = _refuses_system(frame)
    # If the template refuses a system turn, the system text goes in front of the first user's.
    system, between = (
        (first, "\n\n") if fold else _texts_between(frame, [("system", _SYSTEM), turns[0]])[:2]
    )
    result = ChatFormat(
        first=first,
        user_to_assistant=user_to_assistant,
        assistant_to_user=assistant_to_user,
        reply=reply,
        system=system,
        system_to_user=between,
        trim_user=_trims(frame, turns, 0),
        trim_assistant=_trims(frame, turns, 1),
        trim_system=fold or _trims(frame, [("system", _SYSTEM), turns[0]], 0),
        reply_after=_reply_after(frame),
        reply_without=_reply_without(frame),
        thinking=None,
        tools=None,
    )
    _check(result, frame, fold)
    _check_literals(result, frame)
    return replace(result, tools=tool_format(frame, result))


def _texts_between(frame: ChatFrame, turns: Sequence[tuple[str, str]]) -> list[str]:
    """The rendered texts before, between and after the contents."""
    text, parts = frame.render(turns), []
    for _, content in turns:
        before, separator, text = text.partition(content)
        if not separator:
            raise TokenizerError("the chat template leaves out or alters a turn")
        parts.append(before)
    return [*parts, text]


def _refuses_system(frame: ChatFrame) -> bool:
    try:
        frame.render([("system", _SYSTEM), ("user", _USER)])
    except TemplateRefusal:
        return True
    return False


def _trims(frame: ChatFrame, turns: Sequence[tuple[str, str]], index: int) -> bool:
    role, content = turns[index]
    padded = [*turns[:index], (role, _PAD + content + _PAD), *turns[index + 1 :]]
    return _PAD + content + _PAD not in frame.render(padded)


def _literals(frame: ChatFrame) -> list[str]:
    """The texts in the template's source, which it may look for in a message."""
    found = (single or double for single, double in _LITERAL.findall(frame.template))
    return [text for text in dict.fromkeys(found) if text.strip()]


def _reply_after(frame: ChatFrame) -> str:
    """The text up to which the template removes earlier replies; "" if it removes nothing."""
    for literal in _literals(frame):
        turns = [("user", _USER), ("assistant", _SYSTEM + literal + _REPLY), ("user", _USER_2)]
        text = frame.render(turns)
        if _SYSTEM not in text and _REPLY in text:
            return literal
    return ""


def _reply_without(frame: ChatFrame) -> tuple[str, str] | None:
    """The texts between which the template removes a part of earlier replies."""
    for opens, closes in _pairs(frame):
        said = f"{_REPLY}{opens}{_SYSTEM}{closes}{_USER_2}"
        text = frame.render([("user", _USER), ("assistant", said), ("user", _USER)])
        if _REPLY + _USER_2 in text:
            return opens, closes
    return None


def _pairs(frame: ChatFrame) -> Iterator[tuple[str, str]]:
    """Pairs of the texts that the template doesn't leave as they are in a reply."""
    changed = []
    for literal in _literals(frame):
        said = f"{_REPLY}{literal}{_USER_2}"
        if said not in frame.render([("user", _USER), ("assistant", said), ("user", _USER)]):
            changed.append(literal)
    return permutations(changed, 2)


def _check(result: ChatFormat, frame: ChatFrame, fold: bool) -> None:
    """Compare conversations of 1 to 9 turns, with and without padding and a system turn."""
    for pad in ("", _PAD):
        for turns in range(1, 10, 2):
            messages = [
                (("user", "assistant")[index % 2], f"{pad}{index}{'8' * 39}{pad}")
                for index in range(turns)
            ]
            _compare(result, frame, messages, messages)
            system = f"{pad}{_SYSTEM}{pad}"
            with_system = [("system", system), *messages]
            folded = [("user", f"{system.strip()}\n\n{messages[0][1].strip()}"), *messages[1:]]
            _compare(result, frame, with_system, folded if fold else with_system)


def _check_literals(result: ChatFormat, frame: ChatFrame) -> None:
    """Compare conversations whose contents have the texts that the template may look for."""
    for literal in _literals(frame):
        for first, second in ((_PAD, _PAD), ("", "\n\n")):
            content = f"{first}{_REPLY}{literal}{second}{_SYSTEM}{literal}{second}{_USER_2}{first}"
            turns = [("user", content), ("assistant", content), ("user", content)]
            _compare(result, frame, turns, turns)
    for one, other in _pairs(frame):
        content = f"{_PAD}{one}{_REPLY}{other}{_SYSTEM}{other}{one}{_USER_2}{one}{_USER}{other}"
        turns = [("user", content), ("assistant", content), ("user", content)]
        _compare(result, frame, turns, turns)


def _compare(
    result: ChatFormat,
    frame: ChatFrame,
    messages: Sequence[tuple[str, str]],
    template_messages: Sequence[tuple[str, str]],
) -> None:
    if result.render(messages) != frame.render(template_messages):
        raise TokenizerError(
            f"the chat template renders a conversation of {len(messages)} turns in a way that "
            "fixed texts between the turns can't reproduce; phones can't render it"
        )
