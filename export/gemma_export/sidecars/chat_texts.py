"""What `chat.json` holds of a chat template."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class ToolMarks:
    """The texts around declarations, calls and results of tools, as Gemma 4's template writes them.

    Between them are names and values in that template's syntax: see `marked_tools.py`. A model's
    turn holds its calls, their results, and what it says to them.
    """

    quote: str  # on both sides of a text
    declaration: tuple[str, str]
    call: tuple[str, str]
    response: tuple[str, str]
    thought: tuple[str, str]  # it stays before its calls until the user's next turn
    unanswered: str  # after calls without results, before the content of the user's next turn
    reply: str  # after results, before what the model says to them
    reply_after_text: str  # the same if it has said something beside the calls
    waits: str  # the control token with which the model waits for results


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How tools get into a prompt: after a text as JSON, or as the template writes them.

    `prompt` and the tools as JSON are joined to the system turn; calls are JSON, and results
    blocks in a turn of the user. One of the two is None.
    """

    prompt: str | None
    marks: ToolMarks | None


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The texts before, between and after the contents of alternating turns.

    Control tokens are written as their names, bos too.
    """

    first: str  # before the first user content, if there is no system turn
    user_to_assistant: str
    assistant_to_user: str
    reply: str  # after the last user content
    system: str  # before the system content, if there is one
    system_to_user: str
    trim_user: bool  # whether outer white space of the content is removed
    trim_assistant: bool
    trim_system: bool
    # Of an earlier reply only the text after the last of these counts, e.g. "</think>"; "" if all
    # of it counts.
    reply_after: str
    # Of an earlier reply, everything between these two is left out, e.g. "<|channel>" and
    # "<channel|>"; after the first without the second, all of the rest.
    reply_without: tuple[str, str] | None
    thinking: "ChatFormat | None"  # the format that asks for thoughts; None if there is none
    tools: ToolFormat | None  # None if phones can't give this model tools

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Render (role, content) turns as text, up to the start of the reply."""
        text, before = "", self.first
        for role, content in messages:
            after = {
                "system": self.system_to_user,
                "user": self.user_to_assistant,
                "assistant": self.assistant_to_user,
            }[role]
            before = self.system if role == "system" else before
            text += before + self.shown(role, content)
            before = after
        return text + self.reply

    def shown(self, role: str, content: str) -> str:
        """What the template writes of a turn's content."""
        trims = {
            "system": self.trim_system,
            "user": self.trim_user,
            "assistant": self.trim_assistant,
        }
        content = self._without_thoughts(content) if role == "assistant" else content
        return content.strip() if trims[role] else content

    def _without_thoughts(self, reply: str) -> str:
        if self.reply_after:
            reply = reply.rpartition(self.reply_after)[2]
        if self.reply_without is None:
            return reply
        opens, closes = self.reply_without
        return "".join(part.partition(opens)[0] for part in reply.split(closes))
