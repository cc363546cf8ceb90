"""What a bundle will weigh and need, before a weight is read.

Sizes and caches are exact. Memory is estimated from what was measured on real exports and real
sessions (`tests/export/test_plan.py` keeps the two together).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from gemma_export.checkpoint import BLOCK_ELEMENTS
from gemma_export.config import GemmaConfig
from gemma_export.memory import format_bytes
from gemma_export.quantize.recipe import FLOAT, TABLE, Format, bits_per_weight
from gemma_export.reference import PROMPT_TOKENS, PROMPTS
from gemma_export.targets import Geometry
from gemma_runtime.manifest import AttentionKind, LayerCache

Component = Literal["table", "attention", "mlp", "norms", "ropes"]
Verdict = Literal["fits", "tight", "does not fit"]

_MIB = 1 << 20
_GIB = 1 << 30
_FLOAT_BYTES = 4  # of scales in the file, of caches, logits, norms and rope tables
_PAGE = 4096  # every tensor of the data file starts on one

# What an app may use of a phone's RAM. iOS ends a process at about half of the RAM (2 of 4 GB, 3 of
# 6); Android has no such line, but what its low-memory killer spares beside the system is no more.
_BUDGET_SHARE = 0.5
_COMFORT = 0.75  # of the budget: the app's own screens, pictures and the keyboard need the rest
_PHONES_GB = (4, 6, 8, 12)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many weights there are; the table is embedding and head in one."""

    table: int
    attention: int
    mlp: int
    norms: int
    total: int


@dataclass(frozen=True, slots=True)
class ArtifactBytes:
    """What the artifact's weights file holds, part by part."""

    table: int
    attention: int
    mlp: int
    norms: int
    ropes: int  # tables of cos and sin over the whole context
    padding: int  # every tensor starts on a page
    total: int


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Keys and values of all layers, by kind."""

    local: int
    full: int  # of the global layers
    saved: int  # by rings, against the whole context on every layer
    note: str  # the same as a sentence
    total: int


@dataclass(frozen=True, slots=True)
class RunBytes:
    """Resident memory of a session with full caches."""

    weights: int  # the mapped file
    prepacked: int  # the runtime's own copy, in the order its kernels read
    caches: int
    activations: int  # of the longest prefill chunk, and the logits
    runtime: int  # the runtime's code and tables
    total: int


@dataclass(frozen=True, slots=True)
class PhoneVerdict:
    """Whether an app on a phone of this much RAM can run the bundle."""

    ram_gb: int
    budget: int  # bytes that an app may use
    needed: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Plan:
    target: str
    family: str
    context_length: int
    prefill_length: int
    parameters: Parameters
    bits_per_weight: float  # of the recipe: codes, fp16 scales, zero points
    file_bits_per_weight: float  # of the artifact, which may hold wider scales
    artifact: ArtifactBytes
    caches: CacheBytes
    run: RunBytes
    export_peak_bytes: int
    phones: tuple[PhoneVerdict, ...]


def make_plan(
    config: GemmaConfig,
    formats: Mapping[str, Format],
    caches: Sequence[LayerCache],
    geometry: Geometry,
    target: str,
) -> Plan:
    """Sizes, caches, memory and phones from the shapes alone."""
    parameters = _parameters(config)
    artifact = _artifact(config, formats, geometry.context_length)
    cache_bytes = _caches(caches, geometry.context_length)
    run = _run(config, artifact, cache_bytes, geometry)
    matrices = parameters.total - parameters.norms
    return Plan(
        target=target,
        family=config.family,
        context_length=geometry.context_length,
        prefill_length=geometry.prefill_length,
        parameters=parameters,
        bits_per_weight=bits_per_weight(config, formats),
        file_bits_per_weight=8 * (artifact.table + artifact.attention + artifact.mlp) / matrices,
        artifact=artifact,
        caches=cache_bytes,
        run=run,
        export_peak_bytes=_export_peak(config, formats, geometry.context_length),
        phones=tuple(_phone(gigabytes, run.total) for gigabytes in _PHONES_GB),
    )


def _parameters(config: GemmaConfig) -> Parameters:
    counts: dict[Component, int] = dict.fromkeys(("table", "attention", "mlp", "norms"), 0)
    for name, shape in config.tensor_shapes().items():
        counts[_component(name, shape)] += int(np.prod(shape))
    return Parameters(
        counts["table"], counts["attention"], counts["mlp"], counts["norms"], config.parameters
    )


def _component(name: str, shape: tuple[int, ...]) -> Component:
    if len(shape) == 1:
        return "norms"
    if name == TABLE:
        return "table"
    return "attention" if ".self_attn." in name else "mlp"


def _artifact(
    config: GemmaConfig, formats: Mapping[str, Format], context_length: int
) -> ArtifactBytes:
    counts: dict[Component, int] = dict.fromkeys(("table", "attention", "mlp", "norms", "ropes"), 0)
    pages = 0
    for component, length in _regions(config, formats, context_length):
        counts[component] += length
        pages += -(-length // _PAGE) * _PAGE
    return ArtifactBytes(
        table=counts["table"],
        attention=counts["attention"],
        mlp=counts["mlp"],
        norms=counts["norms"],
        ropes=counts["ropes"],
        padding=pages - sum(counts.values()),
        total=pages,
    )


def _regions(
    config: GemmaConfig, formats: Mapping[str, Format], context_length: int
) -> Iterator[tuple[Component, int]]:
    """Every tensor of the data file, as `targets/onnx_ops.py` lays them out."""
    shapes = config.tensor_shapes()
    for names in _products(config):
        for form, together in groupby(names, key=lambda name: formats.get(name, FLOAT)):
            stack = list(together)
            rows, width = sum(shapes[name][0] for name in stack), shapes[stack[0]][1]
            component = _component(stack[0], shapes[stack[0]])
            for length in _matrix_regions(rows, width, form):
                yield component, length
    for shape in shapes.values():
        if len(shape) == 1:
            yield "norms", shape[0] * _FLOAT_BYTES
    for _ in {(rope.base, rope.factor) for rope in (layer.rope for layer in config.layers)}:
        for _ in ("cos", "sin"):
            yield "ropes", context_length * config.head_dim // 2 * _FLOAT_BYTES


def _products(config: GemmaConfig) -> Iterator[list[str]]:
    """Matrices that share an input: those of one format are stored as one."""
    yield [TABLE]
    for index in range(len(config.kinds)):
        for together in ("self_attn.q k v", "self_attn.o", "mlp.gate up", "mlp.down"):
            block, parts = together.split(".")
            yield [f"model.layers.{index}.{block}.{part}_proj.weight" for part in parts.split()]


def _matrix_regions(rows: int, width: int, form: Format) -> list[int]:
    """Bytes of codes, scales and zero points."""
    if form.is_float:
        return [rows * width * _FLOAT_BYTES]
    groups = width // form.group
    zeros = [rows * ((groups * form.bits + 7) // 8)] if form.asymmetric else []
    return [rows * width * form.bits // 8, rows * groups * _FLOAT_BYTES, *zeros]


def _caches(caches: Sequence[LayerCache], context_length: int) -> CacheBytes:
    local = global_ = whole = 0
    for cache in caches:
        size = cache.elements * _FLOAT_BYTES
        whole += size // cache.slots * context_length
        if cache.kind is AttentionKind.LOCAL:
            local += size
        else:
            global_ += size
    saved = whole - local - global_
    amount = format_bytes(saved) if saved else "0 MiB"
    return CacheBytes(
        local=local,
        full=global_,
        saved=saved,
        note=f"ring saves {amount} at this context",
        total=local + global_,
    )


# Of a session: measured with onnxruntime 1.32 on Linux.
_RUNTIME_BYTES = 64 * _MIB
_PREPACKED_SHARE = 1.15


def _run(
    config: GemmaConfig, artifact: ArtifactBytes, caches: CacheBytes, geometry: Geometry
) -> RunBytes:
    matrices = artifact.table + artifact.attention + artifact.mlp
    prepacked = round(matrices * _PREPACKED_SHARE)
    activations = _activation_bytes(config, geometry.prefill_length)
    parts = (artifact.total, prepacked, caches.total, activations, _RUNTIME_BYTES)
    return RunBytes(*parts, total=sum(parts))


def _activation_bytes(config: GemmaConfig, tokens: int) -> int:
    """The widest values alive at once: gate and up together, apart, and their product."""
    row = 5 * config.intermediate_size + 4 * config.hidden_size
    return (tokens * row + 2 * config.vocab_size) * _FLOAT_BYTES


# Of an export: measured with torch 2.13 on Linux.
_IMPORT_BYTES = 330 * _MIB
_TOKENIZER_BYTES_PER_TOKEN = 700
_BLOCK_COPIES = 6


def _export_peak(config: GemmaConfig, formats: Mapping[str, Format], context_length: int) -> int:
    positions = len(PROMPTS) * min(PROMPT_TOKENS, context_length)
    logits = 2 * positions * config.vocab_size * _FLOAT_BYTES
    blocks = _BLOCK_COPIES * BLOCK_ELEMENTS * _FLOAT_BYTES
    tokenizer = config.vocab_size * _TOKENIZER_BYTES_PER_TOKEN
    return _IMPORT_BYTES + tokenizer + blocks + logits


def _phone(gigabytes: int, needed: int) -> PhoneVerdict:
    budget = round(gigabytes * _GIB * _BUDGET_SHARE)
    verdict: Verdict = "does not fit"
    if needed <= budget:
        verdict = "fits" if needed <= budget * _COMFORT else "tight"
    return PhoneVerdict(gigabytes, budget, needed, verdict)


def render_plan(plan: Plan) -> RenderableType:
    """The plan as the console shows it."""
    table = Table(show_header=False, box=None, title=f"plan for {plan.target}")
    table.add_row("context", f"{plan.context_length} tokens")
    return Group(table)
