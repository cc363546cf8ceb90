"""Tells a reply's thoughts from its answer: Gemma 4 writes them in a channel before it.

    <|channel>thought
    …<channel|>the answer

Source: the chat template of google/gemma-4, which also removes thoughts from earlier turns.
"""

from gemma_runtime.text.tokenizer import Tokenizer

_OPEN, _CLOSE = "<|channel>", "<channel|>"


class Thoughts:
    """Takes what a reply writes into channels, token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._open, self._close = tokenizer.token_id(_OPEN), tokenizer.token_id(_CLOSE)
        self._is_open = False
        self._written = ""

    def take(self, token: int, text: str) -> bool:
        """Whether a token belongs to a thought; `text` is what it completes."""
        if token == self._open is not None:
            self._is_open = True
            return True
        if not self._is_open:
            return False
        self._written += text
        self._is_open = token != self._close
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
