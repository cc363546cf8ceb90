"""Core ML bundles, by our interpreter of ML Programs: any machine, float16 as a device rounds it.

T tokens of a chunk, S slots, D head size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.bundle import Bundle
from gemma_runtime.manifest import AttentionKind, LayerCache, Manifest
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.session import Logits
from gemma_runtime.step_session import StepSession

# Far below any score, and within float16: -inf is not for every one of Apple's units.
_HIDDEN = -4e4


def open_coreml_session(bundle: Bundle, threads: int | None, graph: str) -> StepSession:
    """Interpret the bundle's package."""
    package = (bundle.directory / bundle.manifest.graphs[graph].file).parent
    return StepSession(MilEngine(package, bundle.manifest, threads), bundle.manifest)


class MilEngine:
    """Brings the program its masks and slots, as an app on a phone does."""

    def __init__(self, package: Path, manifest: Manifest, threads: int | None = None) -> None:
        self.program = Program(package, threads)
        for function in ("prefill", "decode"):  # what can't be run is told at once
            self.program.prepare(function)
        self._manifest = manifest
        self._state = self.program.make_state("decode")

    def run(self, tokens: Sequence[int], position: int) -> Logits:
        function = "decode" if len(tokens) == 1 else "prefill"
        length = self._manifest.prefill_length if function == "prefill" else 1
        inputs: dict[str, NDArray[np.generic]] = {
            "tokens": _padded(tokens, length),
            "positions": _padded(range(position, position + len(tokens)), length),
            "last": np.array([len(tokens) - 1]),
        }
        for kind in AttentionKind:
            cache = next((c for c in self._manifest.layers if c.kind is kind), None)
            if cache is not None:
                inputs[f"{kind.value}_slots"] = _slots(position, len(tokens), length, cache)
                inputs[f"{kind.value}_mask"] = self._mask(position, len(tokens), length, cache)
        given = {n: inputs[n] for n in self.program.inputs(function)}
        (logits,) = self.program.run(function, given, self._state).values()
        return logits.reshape(-1).astype(np.float32)

    def close(self) -> None:
        self.program.close()
        del self.program, self._state

    def _mask(
        self, position: int, count: int, length: int, cache: LayerCache
    ) -> NDArray[np.float16]:
        """What each token of the chunk sees: (T, S + …)."""
        query = position + np.arange(length)[:, None]  # (T, 1)
        if cache.kind is AttentionKind.LOCAL:
            held = position - 1 - np.mod(position - 1 - np.arange(cache.slots), cache.slots)
            chunk = np.where(np.arange(length) < count, position + np.arange(length), -1)
            held = np.concatenate([held, chunk])
        else:
            rows = _rows(self._manifest, cache)
            held = np.where(np.arange(rows) < position + count, np.arange(rows), -1)
        seen = (held >= 0) & (held <= query)
        if cache.window is not None:
            seen &= held > query - cache.window
        return np.where(seen, 0.0, _HIDDEN).astype(np.float16)


def _slots(position: int, count: int, length: int, cache: LayerCache) -> NDArray[np.int64]:
    """Where each token is written; padding goes to the row behind the slots."""
    places = (position + np.arange(length)) % cache.slots
    return np.where(np.arange(length) < count, places, cache.slots)


def _rows(manifest: Manifest, cache: LayerCache) -> int:
    """Slots and the trash behind them, as the state was laid out."""
    name = f"{cache.kind.value}_cache"
    shapes = {state.name: state.shape for state in manifest.graphs["decode"].states}
    return int(shapes[name][1])


def _padded(values: Sequence[int], length: int) -> NDArray[np.int64]:
    return np.pad(np.array(values), (0, length - len(values)))
