"""Targets: the runtimes that a decoder can be exported for.

To add one, add a folder here and a line in TARGETS. The folder's `__init__.py` declares `TARGET`, a
TargetSpec; the Target class itself is imported only when it is used.
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
    from gemma_export.checkpoint import Checkpoint, TokenizerFiles
    from gemma_export.formats.format import Format
    from gemma_export.model.config import GemmaConfig
    from gemma_export.model.int8_cache import LayerScales
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
    "hf": "gemma_export.targets.hf",
}

# Name → value of the targets' own options that the user gave.
Options = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The fixed lengths of one export; caches, graphs and manifest are derived from them."""

    context_length: int
    prefill_length: int
    full_cache: bool = False  # local layers cache the whole context too


@dataclass(frozen=True, slots=True)
class ExportJob:
    """The input of `Target.write`."""

    config: GemmaConfig
    store: QuantizedStore
    geometry: Geometry
    stop_tokens: tuple[int, ...]
    max_residual: float  # largest |x| between layers in the reference's runs
    checkpoint: Checkpoint  # the source, for names and vocabulary
    tokenizer: TokenizerFiles | None = None  # as in the bundle; None for random weights
    cache_scales: Sequence[LayerScales] | None = None  # by layer, of int8 caches; None: float ones
    # The largest |x| that a matrix takes or gives in the reference's runs, by the matrix's name.
    max_products: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact:
    """The output of `Target.write`: describes the files for the manifest."""

    graphs: dict[str, tuple[Graph, ...]]
    caches: tuple[LayerCache, ...]
    cache_dtype: str
    runtime: Runtime
    tools: tuple[str, ...]  # packages whose versions the manifest records
    headroom_factor: float = 1.0  # scales the residual down for float16; folded into the weights
    roles: Mapping[str, str] = field(default_factory=dict)  # role in the manifest → further file


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def caches(self, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
        """The cache layout of every layer; needs no weights."""
        ...

    def check(self, formats: Mapping[str, Format], geometry: Geometry) -> None:
        """Raise TargetError for formats and lengths that the target doesn't support."""
        ...

    def write(self, job: ExportJob, folder: Path, progress: Tick) -> Artifact:
        """Write the artifact; `progress` takes a tensor's name and the bytes just written."""
        ...


def all_targets() -> list[TargetSpec]:
    """The declarations of all targets."""
    return [target_spec(name) for name in TARGETS]


def target_spec(name: str) -> TargetSpec:
    """The declaration of one target. Raises TargetError with the choices, nearest first."""
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}; choose from {nearest_first(name, TARGETS)}")
    spec: TargetSpec = import_module(TARGETS[name]).TARGET
    return spec


def load_targets(names: Sequence[str], options: Options) -> list[Target]:
    """Import targets. Raises TargetError for an option that none of them has."""
    specs = [target_spec(name) for name in names]
    taken = {option.name for spec in specs for option in spec.options}
    for name, value in options.items():
        if name not in taken:
            owner, option = _owner(name)
            raise TargetError(
                f"{option.flag} {value} is an option of --target {owner}, not of {', '.join(names)}"
            )
    return [load_target(name, options) for name in names]


def load_target(name: str, options: Options | None = None) -> Target:
    """Import a target and create it with those of the options that it has.

    Raises TargetError for an unknown target or option value.
    """
    spec = target_spec(name)
    module, attribute = spec.made_by.split(":")
    given = options or {}
    values = {option.name: given.get(option.name, option.default) for option in spec.options}
    for option in spec.options:
        _check_value(option, values[option.name])
    target: Target = getattr(import_module(module), attribute)(**values)
    return target


def cache_dtype(name: str, wanted: str | None) -> str:
    """The type of a target's KV caches. Raises TargetError for one that the target doesn't have."""
    spec = target_spec(name)
    if wanted is None or wanted in spec.caches:
        return wanted or spec.caches[0]
    takers = [spec.name for spec in all_targets() if wanted in spec.caches]
    if not takers:
        known = {dtype for spec in all_targets() for dtype in spec.caches}
        raise TargetError(f"--cache is {wanted!r}; choose from {nearest_first(wanted, known)}")
    reason = f": {spec.only_caches}" if spec.only_caches else ""
    raise TargetError(
        f"--cache {wanted} is not for {name}{reason}; leave it out, or choose --target "
        f"{' or '.join(takers)}"
    )


def require_packages(name: str) -> None:
    """Raise MissingExtra unless all packages for exporting to a target are installed."""
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


def refuse_irregular(target: str, config: GemmaConfig) -> None:
    """Raise TargetError for a model with parts that the target doesn't compute."""
    if not config.irregular or target_spec(target).takes_irregular:
        return
    takers = [spec.name for spec in all_targets() if spec.takes_irregular]
    raise TargetError(
        f"{target} can't compute this model's {', '.join(config.irregular)} yet; choose --target "
        f"{' or '.join(takers)}"
    )


def refuse_encoder(target: str) -> None:
    """Raise TargetError for a target that writes only models that generate text."""
    if not target_spec(target).takes_encoders:
        takers = [spec.name for spec in all_targets() if spec.takes_encoders]
        raise TargetError(
            f"{target} has no graph for models that give vectors; choose --target "
            f"{' or '.join(takers)}"
        )


def refuse_split(target: str, formats: Mapping[str, Format]) -> None:
    """Raise TargetError for a table with int8 columns."""
    for name, fmt in formats.items():
        if fmt.int8_columns:
            raise TargetError(
                f"{target} can't store {name} as {fmt}; remove `int8_columns` from the recipe, "
                "or choose --target onnx"
            )
