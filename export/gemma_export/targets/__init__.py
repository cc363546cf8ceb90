"""Targets: where a decoder can be written to. A new one is a file here and a line in TARGETS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from gemma_export.checkpoint import Checkpoint
from gemma_export.config import GemmaConfig
from gemma_export.quantize.recipe import Format
from gemma_export.quantize.store import QuantizedStore
from gemma_runtime.errors import MissingExtra, TargetError, nearest_first
from gemma_runtime.manifest import Graph, LayerCache
from gemma_runtime.manifest import Target as Runtime

TARGETS: Mapping[str, str] = {
    "onnx": "gemma_export.targets.onnx:OnnxTarget",
    "executorch": "gemma_export.targets.executorch:ExecutorchTarget",
    "coreml": "gemma_export.targets.coreml:CoremlTarget",
    "gguf": "gemma_export.targets.gguf:GgufTarget",
}


DELEGATE = "xnnpack"


@dataclass(frozen=True, slots=True)
class Geometry:
    """The static sizes of one export. Caches, graphs and manifest all come from it."""

    context_length: int
    prefill_length: int
    full_cache: bool = False  # local layers keep the whole context too


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What a target is asked to write."""

    config: GemmaConfig
    store: QuantizedStore
    geometry: Geometry
    stop_tokens: tuple[int, ...]
    max_residual: float  # largest |x| between layers that the reference met
    checkpoint: Checkpoint  # what it was all made from: names, vocabulary


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a target wrote into the folder it was given."""

    graphs: dict[str, Graph]
    caches: tuple[LayerCache, ...]
    cache_dtype: str
    runtime: Runtime
    tools: tuple[str, ...]  # packages whose versions shaped the artifact
    headroom_factor: float = 1.0  # of the residual, folded into weights for float16


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """The cache layout, known before any weight is read."""
        ...

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Raise TargetError for what it has no kernel for, before any weight is read."""
        ...

    def write(self, job: ExportJob, folder: Path, progress: Callable[[str, int], None]) -> Artifact:
        """Write the artifact; `progress` takes a tensor's name and the bytes just written."""
        ...


def load_target(name: str, delegate: str = DELEGATE) -> Target:
    """Import a target. Raises TargetError with the choices, nearest first.

    `delegate` is ExecuTorch's word for what a program runs on; other targets have no such choice.
    """
    if name not in TARGETS:
        raise TargetError(f"no target {name!r}; there are: {nearest_first(name, TARGETS)}")
    module, attribute = TARGETS[name].split(":")
    if delegate != DELEGATE and name != "executorch":
        raise TargetError(f"--delegate {delegate} goes with --target executorch, not with {name}")
    try:
        make = getattr(import_module(module), attribute)
        target: Target = make() if delegate == DELEGATE else make(delegate)
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or name).split(".")[0], name) from error
    return target
