"""Sessions on graphs that give one row of logits per call, as phones' runners want them.

T new tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from gemma_runtime.manifest import Manifest
from gemma_runtime.session import Logits, check_room, check_tokens


class Engine(Protocol):
    def run(self, tokens: Sequence[int], position: int) -> Logits:
        """Append tokens at a position; the logits after the last of them, (V,)."""
        ...

    def close(self) -> None: ...


class StepSession:
    """A session over an engine whose graph gives the last token's logits alone.

    So `score` takes its tokens one by one.
    """

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self._engine = engine
        self._manifest = manifest
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def context_length(self) -> int:
        return self._manifest.context_length

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        step = self._manifest.prefill_length
        for start in range(0, len(tokens), step):
            logits = self._run(tokens[start : start + step])
        return logits  # (V,)

    def decode(self, token: int) -> Logits:
        return self.prefill([token])

    def score(self, tokens: Sequence[int]) -> Logits:
        self._check(tokens)
        return np.stack([self._run([token]) for token in tokens])  # (T, V)

    def reset(self) -> None:
        # Slots past the position are never seen, so nothing has to be cleared.
        self._position = 0

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, tokens: Sequence[int]) -> None:
        check_tokens(tokens, self._manifest.vocab_size)
        check_room(self._position, len(tokens), self.context_length)

    def _run(self, chunk: Sequence[int]) -> Logits:
        logits = self._engine.run(chunk, self._position)
        self._position += len(chunk)
        return logits
