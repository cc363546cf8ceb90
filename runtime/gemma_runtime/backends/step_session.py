"""Sessions on graphs that return one row of logits per call, as phone runners expect.

T new tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gemma_runtime.backends.chunked_session import ChunkedSession
from gemma_runtime.manifest import Manifest
from gemma_runtime.session import Logits
from gemma_runtime.snapshot import Caches


class Engine(Protocol):
    def run(self, tokens: Sequence[int], position: int) -> Logits:
        """Append tokens at a position; returns the logits after the last one, (V,)."""
        ...

    @property
    def caches(self) -> Caches | None:
        """None if the program keeps its caches to itself."""
        ...

    def close(self) -> None: ...


class StepSession(ChunkedSession):
    """A session over an engine whose graph returns only the last token's logits.

    So `score` runs its tokens one by one.
    """

    def __init__(self, engine: Engine, manifest: Manifest, runner: str | None = None) -> None:
        super().__init__(manifest)
        self._engine = engine
        self._runner = runner  # if the target has several, which may round differently

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._admit(tokens)
        for chunk in self._chunks(tokens):
            logits = self._run(chunk)
        return logits  # (V,)

    def score(self, tokens: Sequence[int]) -> Logits:
        self._admit(tokens)
        return np.stack([self._run([token]) for token in tokens])  # (T, V)

    def close(self) -> None:
        self._engine.close()

    def _holds(self, position: int, written: int) -> bool:
        """Position p lies in slot p mod S: a later token has replaced the one S before it.

        A token after `position` sees `window` tokens, itself included.
        """
        return all(
            written - layer.slots <= max(0, position - layer.window + 1)
            for layer in self._manifest.layers
            if layer.window is not None
        )

    @property
    def _graph(self) -> str:
        file = super()._graph
        return file if self._runner is None else f"{file} in {self._runner}"

    @property
    def _caches(self) -> Caches | None:
        return self._engine.caches

    def _run(self, chunk: Sequence[int]) -> Logits:
        logits = self._engine.run(chunk, self.position)
        self._tokens += chunk
        return logits
