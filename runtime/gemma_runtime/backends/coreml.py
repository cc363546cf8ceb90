"""Core ML bundles: on Core ML itself on macOS, elsewhere on our interpreter of ML Programs.

The interpreter rounds to float16 as a device does. The Core ML path follows coremltools'
documentation; we have never run it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma_runtime.backends.chunk_inputs import Array, ChunkInputs
from gemma_runtime.backends.embedding_table import open_tables
from gemma_runtime.backends.step_session import StepSession
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import BundleError, MissingExtra
from gemma_runtime.manifest import Graph, TensorRole, TensorSpec
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.quiet import quiet
from gemma_runtime.session import Logits
from gemma_runtime.snapshot import WholeCaches

FUNCTIONS = ("prefill", "decode")


def open_coreml_session(bundle: Bundle, threads: int | None, graph: str) -> StepSession:
    """Open on Core ML on macOS, which ignores `threads`; elsewhere on the interpreter."""
    if sys.platform == "darwin":
        return StepSession(CoremlEngine(bundle, CoreMlDevice), bundle.manifest)
    return open_interpreter(bundle, threads)


def open_interpreter(bundle: Bundle, threads: int | None = None) -> StepSession:
    """Open on the interpreter, on any system."""
    engine = CoremlEngine(bundle, lambda package: Interpreter(package, threads))
    return StepSession(engine, bundle.manifest)


class Device(Protocol):
    """Runs the functions of a package on one state."""

    def run(self, function: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...

    def read_state(self, name: str) -> Array:
        """What a state holds now. The array may not be changed."""
        ...

    def write_state(self, name: str, value: Array) -> None: ...

    def close(self) -> None: ...


class Interpreter:
    """Our interpreter, in numpy."""

    def __init__(self, package: Path, threads: int | None = None) -> None:
        self.program = Program(package, threads)
        for function in FUNCTIONS:  # fail now if an operation is unsupported
            self.program.prepare(function)
        self._state = self.program.make_state("decode")

    def run(self, function: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.program.run(function, inputs, self._state)

    def read_state(self, name: str) -> Array:
        return self._state[name]

    def write_state(self, name: str, value: Array) -> None:
        self._state[name] = value

    def close(self) -> None:
        self.program.close()


class CoreMlDevice:
    """Apple's runtime. Both functions are loaded and share one state."""

    def __init__(self, package: Path) -> None:
        try:
            with quiet():
                from coremltools.models import MLModel
        except ModuleNotFoundError as error:
            raise MissingExtra("coremltools", "coreml") from error
        self._models = {name: MLModel(str(package), function_name=name) for name in FUNCTIONS}
        self._state = self._models["decode"].make_state()

    def run(self, function: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        found: Mapping[str, Array] = self._models[function].predict(dict(inputs), state=self._state)
        return found

    def read_state(self, name: str) -> Array:
        found: Array = self._state.read_state(name)
        return found

    def write_state(self, name: str, value: Array) -> None:
        self._state.write_state(name, value)

    def close(self) -> None:
        self._models.clear()


@dataclass(frozen=True, slots=True)
class _Part:
    """A package's device, and its graphs by function name."""

    device: Device
    graphs: dict[str, Graph]


class CoremlEngine:
    """Runs a chunk through all packages and computes their inputs, as an app on a phone does."""

    def __init__(self, bundle: Bundle, open_device: Callable[[Path], Device]) -> None:
        self._manifest = bundle.manifest
        graphs = _graphs(bundle)
        self._tables = open_tables(bundle, graphs[0]["decode"])
        self._parts = [_open(bundle, own, open_device) for own in graphs]

    def run(self, tokens: Sequence[int], position: int) -> Logits:
        function = "decode" if len(tokens) == 1 else "prefill"
        chunk = ChunkInputs(self._manifest, self._tables, tokens, position)
        result: Array = np.empty(0)
        for part in self._parts:
            graph = part.graphs[function]
            hidden = {s.name: result for s in graph.inputs if s.role is TensorRole.HIDDEN}
            (result,) = part.device.run(function, chunk.of(graph) | hidden).values()
        return result.reshape(-1).astype(np.float32)

    @property
    def caches(self) -> "_States":
        return _States(self._parts)

    def close(self) -> None:
        for part in self._parts:
            part.device.close()
        self._parts.clear()


class _States(WholeCaches):
    """The states of all parts. Parts use the same names, so theirs begin with the part's number."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        specs: dict[str, TensorSpec] = {}
        self._homes: dict[str, Device] = {}
        for index, part in enumerate(parts):
            for spec in part.graphs["decode"].states:
                name = f"{index}.{spec.name}"
                specs[name], self._homes[name] = spec, part.device
        super().__init__(specs)

    def _get(self, name: str) -> Array:
        return self._homes[name].read_state(self.specs[name].name)

    def _put(self, name: str, whole: Array) -> None:
        self._homes[name].write_state(self.specs[name].name, whole)


def _graphs(bundle: Bundle) -> list[dict[str, Graph]]:
    """For each part, its graphs by function name."""
    every = [bundle.manifest.graphs.get(name, ()) for name in FUNCTIONS]
    if not every[0] or len(every[0]) != len(every[1]):
        raise BundleError(
            f"manifest.json has {len(every[0])} parts of prefill and {len(every[1])} of decode; "
            "export again"
        )
    return [dict(zip(FUNCTIONS, parts, strict=True)) for parts in zip(*every, strict=True)]


def _open(bundle: Bundle, graphs: dict[str, Graph], open_device: Callable[[Path], Device]) -> _Part:
    return _Part(open_device((bundle.directory / graphs["decode"].file).parent), graphs)
