"""A chat template as the few texts between turns: what phones have in place of Jinja.

The texts are rendered from the template itself, and hold it only where they say what it says for
every conversation tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.chat import CANONICAL_TEMPLATE, ChatFrame
from gemma_runtime.text.template import TemplateRefusal

_USER, _REPLY, _AGAIN, _SYSTEM = (f"{place}{'7' * 38}{place}" for place in range(4))
_PAD = " \n"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What stands before, between and after the contents of user and assistant, in turns.

    Control tokens are written as their names. Bos comes once in front, whether named or not.
    """

    first: str  # before the first user's content, without a system's
    user_to_assistant: str
    assistant_to_user: str
    reply: str  # after the last user's content
    system: str  # before the system's content, where there is one
    system_to_user: str
    trim_user: bool  # white space around a content is dropped
    trim_assistant: bool
    trim_system: bool

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) turns, up to where the reply begins."""
        text, before = "", self.first
        for role, content in messages:
            trim, after = {
                "system": (self.trim_system, self.system_to_user),
                "user": (self.trim_user, self.user_to_assistant),
                "assistant": (self.trim_assistant, self.assistant_to_user),
            }[role]
            before = self.system if role == "system" else before
            text += before + (content.strip() if trim else content)
            before = after
        return text + self.reply


def chat_format(template: str | None, bos: str, eos: str) -> ChatFormat:
    """Raises TokenizerError for a template that these texts can't hold."""
    frame = ChatFrame(CANONICAL_TEMPLATE if template is None else template, bos, eos)
    turns = [("user", _USER), ("assistant", _REPLY), ("user", _AGAIN)]
    first, user_to_assistant, assistant_to_user, reply = _cut(frame, turns)
    fold = _folds_system(frame)
    # A template that has no place for a system's text gets it in front of the first user's.
    system, between = (first, "\n\n") if fold else _cut(frame, [("system", _SYSTEM), turns[0]])[:2]
    found = ChatFormat(
        first=first,
        user_to_assistant=user_to_assistant,
        assistant_to_user=assistant_to_user,
        reply=reply,
        system=system,
        system_to_user=between,
        trim_user=_trims(frame, turns, 0),
        trim_assistant=_trims(frame, turns, 1),
        trim_system=fold or _trims(frame, [("system", _SYSTEM), turns[0]], 0),
    )
    _check(found, frame, fold)
    return found


def _cut(frame: ChatFrame, turns: Sequence[tuple[str, str]]) -> list[str]:
    """What stands around the contents."""
    text, parts = frame.render(turns), []
    for _, content in turns:
        before, found, text = text.partition(content)
        if not found:
            raise TokenizerError("the chat template leaves out or alters a turn")
        parts.append(before)
    return [*parts, text]


def _folds_system(frame: ChatFrame) -> bool:
    try:
        frame.render([("system", _SYSTEM), ("user", _USER)])
    except TemplateRefusal:
        return True
    return False


def _trims(frame: ChatFrame, turns: Sequence[tuple[str, str]], place: int) -> bool:
    role, content = turns[place]
    padded = [*turns[:place], (role, _PAD + content + _PAD), *turns[place + 1 :]]
    return _PAD + content + _PAD not in frame.render(padded)


def _check(found: ChatFormat, frame: ChatFrame, fold: bool) -> None:
    """Conversations of one to nine turns, tight and padded, with a system's text and without."""
    for pad in ("", _PAD):
        for turns in range(1, 10, 2):
            messages = [
                (("user", "assistant")[place % 2], f"{pad}{place}{'8' * 39}{pad}")
                for place in range(turns)
            ]
            _compare(found, frame, messages, messages)
            system = f"{pad}{_SYSTEM}{pad}"
            asked = [("system", system), *messages]
            folded = [("user", f"{system.strip()}\n\n{messages[0][1].strip()}"), *messages[1:]]
            _compare(found, frame, asked, folded if fold else asked)


def _compare(
    found: ChatFormat,
    frame: ChatFrame,
    messages: Sequence[tuple[str, str]],
    asked: Sequence[tuple[str, str]],
) -> None:
    if found.render(messages) != frame.render(asked):
        raise TokenizerError(
            f"the chat template writes a conversation of {len(messages)} turns otherwise than its "
            "turns, one by one, would be written; phones can't render it"
        )
