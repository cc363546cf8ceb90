"""A conversation that a guard watches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from gemma_runtime.text.constraint import Constraint
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.generate import Generation, TextGeneration
from gemma_runtime.text.guard import ContentGuard, violated
from gemma_runtime.text.matcher import Matcher
from gemma_runtime.text.tools import Json


@dataclass(frozen=True, slots=True)
class Withheld:
    """A turn that the guard stopped. The conversation has forgotten it."""

    withheld: Literal["prompt", "reply"]
    policies: Mapping[str, float]  # the violated ones and their probabilities, likeliest first


class GuardedConversation:
    """Checks each prompt before the model sees it, and each reply before anybody does.

    The guard sees one prompt and its reply, not the turns before. If it can't check one, e.g.
    because a text is too long for it, its error is raised, and the turn is forgotten too.
    """

    def __init__(self, conversation: Conversation, guard: ContentGuard) -> None:
        self._conversation = conversation
        self._guard = guard

    def send(
        self,
        content: str,
        max_new_tokens: int | None = None,
        constraint: Constraint | Matcher | None = None,
    ) -> Generation | Withheld:
        """The whole reply to `content`, or what the guard stopped."""
        return self._checked(
            content, lambda: self._conversation.send(content, max_new_tokens, constraint)
        )

    def send_results(
        self,
        results: Sequence[Json],
        max_new_tokens: int | None = None,
        constraint: Constraint | Matcher | None = None,
    ) -> Generation | Withheld:
        """The whole reply to the results of tools, which are checked like a prompt."""
        shown = msgspec.json.encode(results).decode()
        return self._checked(
            shown, lambda: self._conversation.send_results(results, max_new_tokens, constraint)
        )

    def _checked(self, prompt: str, reply: Callable[[], TextGeneration]) -> Generation | Withheld:
        if found := violated(self._guard, self._guard.check(prompt)):
            return Withheld("prompt", found)
        generation = reply()
        is_checked = False
        try:
            list(generation)
            result = generation.result
            found = violated(self._guard, self._guard.check(prompt, _shown(result)))
            is_checked = not found
        finally:  # also if it is interrupted, or the guard fails
            if not is_checked:
                self._conversation.take_back()
        return Withheld("reply", found) if found else result


def _shown(result: Generation) -> str:
    """All that a reader or a tool gets of a reply."""
    text = f"{result.thought}\n{result.text}".strip() if result.thought else result.text
    if not result.tool_calls:
        return text
    return f"{text}\n{msgspec.json.encode(result.tool_calls).decode()}".strip()
