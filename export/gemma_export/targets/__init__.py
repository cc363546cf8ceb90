"""Targets: what a decoder can be written for. A new one is a folder here and a line in TARGETS.

The folder's `__init__.py` declares a `TARGET`, as data; its Target is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gemma_export.targets.spec import Option, TargetSpec
from gemma_runtime.errors import MissingExtra, TargetError, nearest_first

if TYPE_CHECKING:
    from gemma_export.checkpoint import Checkpoint
    from gemma_export.formats.format import Format
    from gemma_export.model.config import GemmaConfig
    from gemma_export.progress import Tick
    from gemma_export.quantize.store import QuantizedStore
    from gemma_runtime.manifest import Graph, LayerCache
    from gemma_runtime.manifest import Target as Runtime

TARGETS: Mapping[str, str] = {
    "onnx": "gemma_export.targets.onnx",
    "executorch": "gemma_export.targets.executorch",
    "coreml": "gemma_export.targets.coreml",
    "coreai": "gemma_export.targets.coreai",
    "gguf": "gemma_export.targets.gguf",
}

# What the user gave of targets' own options, by name.
Options = Mapping[str, str]


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

    graphs: dict[str, tuple[Graph, ...]]
    caches: tuple[LayerCache, ...]
    cache_dtype: str
    runtime: Runtime
    tools: tuple[str, ...]  # packages whose versions shaped the artifact
    headroom_factor: float = 1.0  # of the residual, folded into weights for float16
    roles: Mapping[str, str] = field(default_factory=dict)  # of further files, as in the manifest


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """The cache layout, known before any weight is read."""
        ...

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Raise TargetError for what it has no kernel for, before any weight is read."""
        ...

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        """Write the artifact; `progress` takes a tensor's name and the bytes just written."""
        ...


def all_targets() -> list[TargetSpec]:
    """What every target declares."""
    return [target_spec(name) for name in TARGETS]


def target_spec(name: str) -> TargetSpec:
    """What one target declares. Raises TargetError with the choices, nearest first."""
    if name not in TARGETS:
        raise TargetError(f"no target {name!r}; there are: {nearest_first(name, TARGETS)}")
    spec: TargetSpec = import_module(TARGETS[name]).TARGET
    return spec


def load_targets(names: Sequence[str], options: Options) -> list[Target]:
    """Import targets. Raises TargetError for an option that none of them takes."""
    specs = [target_spec(name) for name in names]
    taken = {option.name for spec in specs for option in spec.options}
    for name, value in options.items():
        if name not in taken:
            owner, option = _owner(name)
            raise TargetError(
                f"{option.flag} {value} goes with --target {owner}, not with {', '.join(names)}"
            )
    return [load_target(name, options) for name in names]


def load_target(name: str, options: Options | None = None) -> Target:
    """Import a target, with those of the options that it takes.

    Raises TargetError for an unknown target or a value that an option can't have.
    """
    spec = target_spec(name)
    module, attribute = spec.made_by.split(":")
    given = options or {}
    values = {option.name: given.get(option.name, option.default) for option in spec.options}
    for option in spec.options:
        _check_value(option, values[option.name])
    target: Target = getattr(import_module(module), attribute)(**values)
    return target


def require_packages(name: str) -> None:
    """Raise MissingExtra if something is not installed that writing for a target needs."""
    spec = target_spec(name)
    for module, package in {"torch": "torch", **spec.packages}.items():
        if find_spec(module) is None:
            raise MissingExtra(package, spec.extra)


def _owner(option_name: str) -> tuple[str, Option]:
    for spec in all_targets():
        for option in spec.options:
            if option.name == option_name:
                return spec.name, option
    raise TargetError(f"no target has an option {option_name!r}")


def _check_value(option: Option, value: str | None) -> None:
    if value is None or value in option.choices:
        return
    choices = ", ".join(option.choices)
    if value in option.unavailable:
        raise TargetError(
            f"{option.flag} {value} needs {option.unavailable[value]}, which pip can't install; "
            f"choose from {choices}"
        )
    raise TargetError(
        f"{option.flag} is {value!r}; choose from {nearest_first(value, option.choices)}"
    )


def refuse_split(target: str, formats: Mapping[str, Format]) -> None:
    """Raise TargetError for a table with int8 columns."""
    for name, form in formats.items():
        if form.int8_columns:
            raise TargetError(
                f"{target} can't store {name} as {form}; remove `int8_columns` from the recipe, "
                "or choose --target onnx"
            )
