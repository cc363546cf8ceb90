"""Hides what could become a control token in the strings of tools, calls and results."""

import re
import secrets
from collections.abc import Collection, Mapping
from functools import cached_property

from gemma_runtime.text.tools import Json


class Mask:
    """Replaces parts of strings by placeholders, and fills them in again.

    Templates look at these strings, for example at types, so a whole one can't be hidden. Of each
    control token the first and the last character is enough. A string that is the name of one, as
    `eos`, has its last character hidden, because the template may write the brackets.
    """

    def __init__(self, pieces: Collection[str]) -> None:
        self._pieces = pieces
        self._placeholders: dict[str, str] = {}  # by the text that they stand for

    def value(self, value: Json) -> Json:
        """A JSON value with all its strings masked, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        return value

    def text(self, text: str) -> str:
        name = text.strip()
        if name and name.casefold() in self._names:
            end = len(text.rstrip())
            return text[: end - 1] + self._placeholder(text[end - 1]) + text[end:]
        return self._pattern.sub(lambda match: self._placeholder(match[0]), text)

    def fill(self, text: str) -> str:
        """The text with everything that its placeholders stand for."""
        for hidden, placeholder in self._placeholders.items():
            text = text.replace(placeholder, hidden)
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
        # Digits, because a template may change letters' case.
        return self._placeholders.setdefault(text, f"{secrets.randbelow(10**40):040}")
