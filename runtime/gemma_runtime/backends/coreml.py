"""Core ML bundles, by our interpreter of ML Programs: on any machine, in a device's float16."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_runtime.bundle import Bundle
from gemma_runtime.chunk_inputs import Array, ChunkInputs
from gemma_runtime.embedding_table import EmbeddingTable
from gemma_runtime.manifest import Graph, Manifest
from gemma_runtime.mil.interpreter import Audit, Program, State
from gemma_runtime.session import Logits
from gemma_runtime.step_session import StepSession


def open_coreml_session(bundle: Bundle, threads: int | None, graph: str) -> StepSession:
    """Interpret the bundle's packages. `threads` are numpy's own affair."""
    return StepSession(MilEngine(bundle), bundle.manifest)


@dataclass(frozen=True, slots=True)
class _Part:
    """A package: its program, its graph by function, and what it carries from call to call."""

    program: Program
    graphs: dict[str, Graph]
    state: State


class MilEngine:
    """Runs a chunk through all packages, and brings masks and slots as an app on a phone does."""

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._parts = [_open(bundle, suffix) for suffix in _suffixes(bundle.manifest)]
        self._table = _open_table(bundle)

    def run(self, tokens: Sequence[int], position: int) -> Logits:
        function = "decode" if len(tokens) == 1 else "prefill"
        chunk = ChunkInputs(self._manifest, self._table, tokens, position)
        hidden: dict[str, Array] = {}
        for part in self._parts:
            inputs = chunk.of(part.graphs[function]) | hidden
            (result,) = part.program.run(function, inputs, part.state).values()
            hidden = {"hidden": result}
        return result.reshape(-1).astype(np.float32)

    @property
    def audits(self) -> list[Audit]:
        """What each package's calls reached."""
        return [part.program.audit for part in self._parts]

    def close(self) -> None:
        self._parts.clear()


def _open(bundle: Bundle, suffix: str) -> _Part:
    graphs = {name: bundle.manifest.graphs[name + suffix] for name in ("prefill", "decode")}
    program = Program((bundle.directory / graphs["decode"].file).parent)
    return _Part(program, graphs, program.make_state("decode"))


def _open_table(bundle: Bundle) -> EmbeddingTable | None:
    shapes = {spec.name: spec.shape for spec in bundle.manifest.graphs["decode"].inputs}
    if "embeddings" not in shapes:
        return None
    return EmbeddingTable(bundle.path("embedding"), int(shapes["embeddings"][1]))


def _suffixes(manifest: Manifest) -> list[str]:
    """Graphs of later packages have a number behind their names."""
    return [name.removeprefix("decode") for name in manifest.graphs if name.startswith("decode")]
