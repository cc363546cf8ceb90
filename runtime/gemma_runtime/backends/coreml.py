"""Core ML bundles, by our interpreter of ML Programs: on any machine, in a device's float16."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_runtime.bundle import Bundle
from gemma_runtime.feeds import make_feeds
from gemma_runtime.manifest import Manifest
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.session import Logits
from gemma_runtime.step_session import StepSession


def open_coreml_session(bundle: Bundle, threads: int | None, graph: str) -> StepSession:
    """Interpret the bundle's package. `threads` are numpy's own affair."""
    package = (bundle.directory / bundle.manifest.graphs[graph].file).parent
    return StepSession(MilEngine(package, bundle.manifest), bundle.manifest)


class MilEngine:
    """Brings the program its masks and slots, as an app on a phone does."""

    def __init__(self, package: Path, manifest: Manifest) -> None:
        self.program = Program(package)
        self._manifest = manifest
        self._state = self.program.make_state("decode")

    def run(self, tokens: Sequence[int], position: int) -> Logits:
        function, inputs = make_feeds(self._manifest, tokens, position)
        (logits,) = self.program.run(function, inputs, self._state).values()
        return logits.reshape(-1).astype(np.float32)

    def close(self) -> None:
        del self.program, self._state
