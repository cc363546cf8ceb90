"""Core ML bundles: by Core ML itself on macOS, elsewhere by our interpreter of ML Programs.

The interpreter rounds to float16 as a device does. Core ML's side follows coremltools'
documentation and was never run by us.

T tokens of a chunk, S slots, D head size.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import MissingExtra
from gemma_runtime.manifest import AttentionKind, LayerCache, Manifest
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.quiet import quiet
from gemma_runtime.session import Logits
from gemma_runtime.step_session import StepSession

# Far below any score, and within float16: -inf is not for every one of Apple's units.
_HIDDEN = -4e4


def open_coreml_session(bundle: Bundle, threads: int | None, graph: str) -> StepSession:
    """Run the bundle's package; `threads` are the interpreter's, Core ML takes what it likes."""
    package = (bundle.directory / bundle.manifest.graphs[graph].file).parent
    device = CoreMlDevice(package) if sys.platform == "darwin" else None
    return StepSession(MilEngine(package, bundle.manifest, threads, device), bundle.manifest)


class Device(Protocol):
    """Runs a function of a package on its own state."""

    def run(
        self, function: str, inputs: Mapping[str, NDArray[np.generic]]
    ) -> Mapping[str, NDArray[np.generic]]: ...


class CoreMlDevice:
    """Apple's runtime. Both functions are loaded, and share one state by its names."""

    def __init__(self, package: Path) -> None:
        try:
            with quiet():
                from coremltools.models import MLModel
        except ModuleNotFoundError as error:
            raise MissingExtra("coremltools", "coreml") from error
        self._models = {
            name: MLModel(str(package), function_name=name) for name in ("prefill", "decode")
        }
        self._state = self._models["decode"].make_state()

    def run(
        self, function: str, inputs: Mapping[str, NDArray[np.generic]]
    ) -> Mapping[str, NDArray[np.generic]]:
        found: Mapping[str, NDArray[np.generic]] = self._models[function].predict(
            dict(inputs), state=self._state
        )
        return found


class MilEngine:
    """Brings the program its masks and slots, as an app on a phone does."""

    def __init__(
        self,
        package: Path,
        manifest: Manifest,
        threads: int | None = None,
        device: Device | None = None,
    ) -> None:
        """Without a device, the package is interpreted."""
        self.program = Program(package, threads)
        self._manifest = manifest
        self._device = device
        self._state = {} if device else self.program.make_state("decode")
        for function in () if device else ("prefill", "decode"):
            self.program.prepare(function)  # what can't be run is told at once

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
        if self._device is None:
            (logits,) = self.program.run(function, given, self._state).values()
        else:
            typed = {n: given[n].astype(t.dtype) for n, t in self.program.inputs(function).items()}
            (logits,) = self._device.run(function, typed).values()
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
