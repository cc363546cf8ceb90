"""Sessions that say what a test wants."""

from collections.abc import Sequence

import numpy as np

from gemma_runtime.errors import ConstraintError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.matcher import Bits

VOCABULARY = 400
END = 5  # <end_of_turn>


def one_hot(token: int) -> Logits:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token] = 1
    return logits


class Recording(FakeSession):
    """A session with one reply per prompt; records the prompts and counts the resets."""

    def __init__(
        self,
        replies: Sequence[Sequence[int]],
        context_length: int = 4096,
        slack: int | None = None,
    ) -> None:
        super().__init__(self._next, context_length, slack)
        self._replies = [list(reply) for reply in replies]
        self._start = 0  # position of the current reply's first token
        self.prompts: list[list[int]] = []
        self.resets = 0

    def prefill(self, tokens: Sequence[int]) -> Logits:
        if len(tokens) > 1:
            self.prompts.append(list(tokens))
            self._start = self.position + len(tokens)
        return super().prefill(tokens)

    def reset(self) -> None:
        self.resets += 1
        super().reset()

    def _next(self, tokens: Sequence[int]) -> Logits:
        reply = self._replies[len(self.prompts) - 1]
        index = max(0, len(tokens) - self._start)
        return one_hot(reply[index] if index < len(reply) else END)


class OneOf:
    """A matcher that allows some sequences of tokens; none may begin with another."""

    def __init__(self, *allowed: Sequence[int]) -> None:
        self._left = [list(tokens) for tokens in allowed]

    def mask(self) -> Bits:
        allowed = np.zeros(VOCABULARY, np.uint8)
        allowed[[tokens[0] if tokens else END for tokens in self._left]] = 1
        return np.packbits(allowed, bitorder="little")

    def accept(self, token: int) -> None:
        self._left = [tokens[1:] for tokens in self._left if tokens and tokens[0] == token]
        if not self._left:
            raise ConstraintError(f"token {token} may not come next")

    def forced(self) -> list[int]:
        first, *others = self._left
        differs = (
            at for at, token in enumerate(first) if any(o[at : at + 1] != [token] for o in others)
        )
        return first[: next(differs, len(first))]

    @property
    def is_done(self) -> bool:
        return self._left == [[]]
