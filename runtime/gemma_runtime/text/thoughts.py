"""Tells a reply's thoughts from its answer: Gemma 4 writes them in a channel before it.

    <|channel>thought
    …<channel|>the answer

Source: the chat template of google/gemma-4, which also removes thoughts from earlier turns. After
the results of tools it opens the channel itself.
"""

from collections.abc import Collection, Sequence

import numpy as np

from gemma_runtime.text.matcher import Bits, Matcher
from gemma_runtime.text.tokenizer import Tokenizer

_OPEN, _CLOSE = "<|channel>", "<channel|>"


class Thoughts:
    """Takes what a reply to `prompt` writes into channels, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._open, self._close = tokenizer.token_id(_OPEN), tokenizer.token_id(_CLOSE)
        self._vocabulary_size = tokenizer.vocabulary_size
        begun = self._begun(prompt)
        self._is_open = begun is not None
        self._written = "" if begun is None else tokenizer.decode(begun)

    def take(self, token: int, text: str) -> bool:
        """Whether a token belongs to a thought; `text` is what it completes."""
        if token == self._open is not None:
            self._is_open = True
            return True
        if not self._is_open:
            return False
        self._is_open = token != self._close
        self._written += text if self._is_open else text.removesuffix(_CLOSE)
        return True

    def end(self, rest: str) -> str:
        """What of the text's end, which no token completed, is not a thought's."""
        if not self._is_open:
            return rest
        self._written += rest
        return ""

    @property
    def text(self) -> str:
        """The thoughts, without the channel's name, which is the first line."""
        return self._written.partition("\n")[2].strip()

    def before(self, answer: Matcher, stop_tokens: Collection[int], thinking: bool) -> Matcher:
        """A matcher that lets the model end, and with `thinking` begin, a thought before an answer.

        Ask for it before the reply begins.
        """
        if self._open is None or self._close is None or not (self._is_open or thinking):
            return answer
        within = _all_but(stop_tokens, self._vocabulary_size)
        return _AfterThought(answer, self._open, self._close, within, self._is_open)

    def _begun(self, prompt: Sequence[int]) -> Sequence[int] | None:
        """The tokens of the channel that a prompt leaves open; None if it leaves none."""
        for at in reversed(range(len(prompt))):
            if prompt[at] == self._open:
                return prompt[at + 1 :]
            if prompt[at] == self._close:
                return None
        return None


class _AfterThought:
    """Anything but a stop token within a thought; from then on what the matcher allows."""

    def __init__(
        self, matcher: Matcher, opens: int, closes: int, within: Bits, is_open: bool
    ) -> None:
        self._matcher = matcher
        self._opens, self._closes = opens, closes
        self._within = within
        self._is_open = is_open
        self._may_open = not is_open

    def mask(self) -> Bits:
        if self._is_open:
            return self._within
        bits = self._matcher.mask()
        if not self._may_open:
            return bits
        needed = self._opens // 8 + 1
        both = np.zeros(max(needed, len(bits)), np.uint8)
        both[: len(bits)] = bits
        both[needed - 1] |= 1 << self._opens % 8
        return both

    def accept(self, token: int) -> None:
        if self._is_open:
            self._is_open = token != self._closes
        elif self._may_open and token == self._opens:
            self._is_open, self._may_open = True, False
        else:
            self._may_open = False
            self._matcher.accept(token)

    def forced(self) -> Sequence[int]:
        return [] if self._is_open or self._may_open else self._matcher.forced()

    @property
    def is_done(self) -> bool:
        return not self._is_open and self._matcher.is_done


def _all_but(tokens: Collection[int], size: int) -> Bits:
    """A mask of a vocabulary of `size` that leaves these tokens out."""
    allowed = np.ones(size, np.uint8)
    allowed[[token for token in tokens if token < size]] = 0
    return np.packbits(allowed, bitorder="little")
