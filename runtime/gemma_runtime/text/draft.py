"""Drafts: guessed tokens that the model checks together, in one step.

A step of four tokens costs a model in memory little more than a step of one. If the model would
have chosen the guessed tokens anyway, their steps are saved; if not, they are taken back.
"""

from collections.abc import Sequence
from typing import Protocol

_LONGEST, _SHORTEST = 4, 2  # tokens of a repeated passage
_COST = 0.3  # of a drafted token, in steps of one token; int8 bundles need less
_LOSS = 0.03  # most of the steps that drafts may cost on text that they can't guess
_FIRST, _MOST = 3, 15  # tokens drafted at first, and at most
_SAVED = 8.0  # most saved steps that are remembered


class Drafter(Protocol):
    """Guesses the next tokens."""

    def draft(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """At most `most` tokens that may follow `tokens`, which is all tokens so far."""
        ...

    def judge(self, drafted: int, accepted: int) -> None:
        """Called after every step: how many tokens were drafted, and how many were right."""
        ...


class PromptLookup:
    """Guesses that a passage goes on as it did before, in the prompt or the text so far.

    Drafts are paid from saved steps, and from `_LOSS` of each step, so that text without
    repetitions is not slowed by more. Their length follows what was right last.
    Method: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # passage → place of what follows it
        self._known = 0  # tokens that are in the index as ends of passages
        self._length = _FIRST
        self._credit = _FIRST * _COST

    def draft(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        end = len(tokens)
        self._index(tokens, end - 1)
        most = min(most, self._length, int(self._credit / _COST + 1e-9))
        place = self._find(tokens, end) if most > 0 else None
        self._index(tokens, end)
        if place is None:
            return []
        period = end - place  # a passage that runs into itself is repeated
        return [tokens[place + at % period] for at in range(most)]

    def judge(self, drafted: int, accepted: int) -> None:
        self._credit = min(_SAVED, self._credit + _LOSS + accepted - drafted * _COST)
        if drafted:
            doubled = accepted == drafted
            self._length = min(_MOST, 2 * self._length) if doubled else max(2, accepted + 1)

    def _index(self, tokens: Sequence[int], end: int) -> None:
        for place in range(self._known + 1, end + 1):
            for length in range(_SHORTEST, min(_LONGEST, place) + 1):
                self._follows[tuple(tokens[place - length : place])] = place
        self._known = max(self._known, end)

    def _find(self, tokens: Sequence[int], end: int) -> int | None:
        lengths = range(min(_LONGEST, end), _SHORTEST - 1, -1)
        found = (self._follows.get(tuple(tokens[end - length : end])) for length in lengths)
        return next((place for place in found if place is not None), None)
