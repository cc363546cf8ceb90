"""Targets: where a decoder can be written to. A new one is a file here and a line in TARGETS."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Protocol

from gemma_export.checkpoint import Checkpoint
from gemma_export.formats.format import Format
from gemma_export.model.config import GemmaConfig
from gemma_export.progress import Tick
from gemma_export.quantize.store import QuantizedStore
from gemma_runtime.errors import MissingExtra, TargetError, nearest_first
from gemma_runtime.manifest import Graph, LayerCache
from gemma_runtime.manifest import Target as Runtime

TARGETS: Mapping[str, str] = {
    "onnx": "gemma_export.targets.onnx.target:OnnxTarget",
    "executorch": "gemma_export.targets.executorch.target:ExecutorchTarget",
    "coreml": "gemma_export.targets.coreml.target:CoremlTarget",
    "coreai": "gemma_export.targets.coreai.target:CoreaiTarget",
    "gguf": "gemma_export.targets.gguf.target:GgufTarget",
}
# Written with a beta's API: asked for by name, so that nothing else breaks when it changes.
BETAS = frozenset({"coreai"})


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What one target alone understands, under the name of its flag."""

    delegate: str = "xnnpack"  # what an ExecuTorch program runs on
    coreml_compute: str = "gpu"  # what a Core ML package is laid out for
    coreml_embed: str | None = None  # where embeddings are looked up; None: as suits the compute


NO_OPTIONS = TargetOptions()
_TAKES: Mapping[str, tuple[str, ...]] = {
    "executorch": ("delegate",),
    "coreml": ("coreml_compute", "coreml_embed"),
}


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
    roles: Mapping[str, str] = field(default_factory=dict)  # of further files, as in the manifest


class Target(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def splits_table(self) -> bool:
        """Whether a table may have some of its channels in int4 and others in int8."""
        ...

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """The cache layout, known before any weight is read."""
        ...

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Raise TargetError for what it has no kernel for, before any weight is read."""
        ...

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        """Write the artifact; `progress` takes a tensor's name and the bytes just written."""
        ...


def load_targets(names: Sequence[str], options: TargetOptions) -> list[Target]:
    """Import targets. Raises TargetError for an option that none of them takes."""
    taken = {option for name in names for option in _TAKES.get(name, ())}
    for option in fields(TargetOptions):
        value = getattr(options, option.name)
        if value != option.default and option.name not in taken:
            (owner,) = (name for name, own in _TAKES.items() if option.name in own)
            flag = option.name.replace("_", "-")
            raise TargetError(
                f"--{flag} {value} goes with --target {owner}, not with {', '.join(names)}"
            )
    return [load_target(name, options) for name in names]


def refuse_split(target: str, formats: Mapping[str, Format]) -> None:
    """Raise TargetError where a table is divided between formats."""
    for name, form in formats.items():
        if form.fine:
            raise TargetError(
                f"{target} takes a table in one format, not {form}, which {name} would be; leave "
                "`fine` out of the recipe, or choose onnx"
            )


def load_target(name: str, options: TargetOptions = NO_OPTIONS) -> Target:
    """Import a target. Raises TargetError with the choices, nearest first."""
    if name not in TARGETS:
        raise TargetError(f"no target {name!r}; there are: {nearest_first(name, TARGETS)}")
    module, attribute = TARGETS[name].split(":")
    try:
        make = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or name).split(".")[0], name) from error
    target: Target = make(*(getattr(options, option) for option in _TAKES.get(name, ())))
    return target
