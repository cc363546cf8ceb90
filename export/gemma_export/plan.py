"""Computes sizes and memory of a bundle and of its export without reading weights.

Sizes and caches are exact. Memory is estimated from measurements of real exports and sessions;
`tests/export/test_plan.py` compares estimates and measurements.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_export.device import HOST, grain, kind_of
from gemma_export.formats.blocks import BLOCK_ELEMENTS
from gemma_export.formats.format import FLOAT, Format, stacks
from gemma_export.model.config import HEAD, PER_LAYER_TABLE, TABLE, GemmaConfig
from gemma_export.quantize.recipe import bits_per_weight
from gemma_export.sidecars.prompts import JUDGED, PROMPTS, long_length
from gemma_export.targets import Geometry, cache_dtype, target_spec
from gemma_export.targets.spec import Costs
from gemma_runtime.machine import format_bytes
from gemma_runtime.manifest import CACHE_WIDTHS, AttentionKind, LayerCache

Component = Literal["table", "head", "per_layer", "attention", "mlp", "norms", "ropes"]
_COMPONENTS: tuple[Component, ...] = ("table", "head", "per_layer", "attention", "mlp", "norms")
_TABLES: Mapping[str, Component] = {TABLE: "table", HEAD: "head", PER_LAYER_TABLE: "per_layer"}
Verdict = Literal["fits", "tight", "does not fit"]

_GIB = 1 << 30
FLOAT_BYTES = 4  # logits, norms, rope tables, and scales in memory
_SCALE_BYTES = 2  # scales in the file

# The share of a phone's RAM that an app may use, as a rule of thumb. iOS ends a process near half
# of the RAM, on some versions earlier. Android has no fixed limit, but system and launcher need 2
# to 3 GB, and its low-memory killer ends the largest processes first.
_PHONES_GB = (4, 6, 8, 12)
_BUDGET_SHARE = 0.45
_COMFORT = 0.75  # share of the budget; the rest is for the app's own screens and web views
_ARENA = 2  # memory of live tensors × this: onnxruntime's arena grows by doubling

# Costs of an export, measured with torch 2.13 (CPU) on Linux x86: 270m with its tokenizer, and
# random weights from 2b to 27b.
_TOKENIZER_BYTES = 130  # per vocabulary entry: tokenizer.json, kept for the bundle
TOKENIZER_PARSING = 1700  # per vocabulary entry while tokenizer.json is parsed
_BLOCK_COPIES = 7  # copies of a block of rows per thread: floats, steps, codes, products
_LOGITS_COPIES = 2  # copies of all prompts' logits while the top ones are selected
_WIDEST_COPIES = 3  # copies of the widest activations


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights."""

    table: int
    head: int  # 0 if it is the table
    per_layer: int  # the table of per-layer embeddings
    attention: int
    mlp: int  # with the gates of per-layer embeddings
    norms: int
    total: int


@dataclass(frozen=True, slots=True)
class ArtifactBytes:
    """Bytes of the artifact's weight files, by part."""

    table: int
    head: int  # 0 if it is the table
    per_layer: int  # stays in its file, if the runtime maps it: see `Costs.maps_per_layer`
    attention: int
    mlp: int
    norms: int
    ropes: int  # tables of cos and sin for the whole context
    padding: int  # because every tensor starts on a page
    total: int


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes of all layers' keys and values, by attention kind."""

    dtype: str
    local: int
    full: int  # global layers
    saved: int  # by ring caches, compared to caching the whole context on every layer
    note: str  # `saved` as text for the user
    total: int


@dataclass(frozen=True, slots=True)
class RunBytes:
    """Resident memory of a session, in bytes."""

    mapped: int  # mapped weights that are read in place
    prepacked: int  # the runtime's copy of weights in its kernels' layout
    caches: int
    activations: int  # for the longest prefill chunk at full context, including logits
    runtime: int  # the runtime itself
    loading: int  # peak while loading, before caches are allocated
    total: int  # peak overall


@dataclass(frozen=True, slots=True)
class PhoneVerdict:
    """Whether an app on a phone with this much RAM can run the bundle."""

    ram_gb: int
    budget: int  # bytes that an app may use
    needed: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage of calibration, by the name that progress shows."""

    name: str
    multiply_adds: int  # of matrix products, and of as many as linear systems take
    moved_bytes: int  # by element-wise steps and files
    seconds: float | None  # at the rates of this machine now; None if it lacks the device


@dataclass(frozen=True, slots=True)
class CalibrationTime:
    """About how long calibration takes, if nothing of it is kept in the cache folder."""

    tokens: int  # of the calibration text, about
    stages: tuple[StageTime, ...]
    seconds: float | None  # of all stages


@dataclass(frozen=True, slots=True)
class Plan:
    target: str
    recipe: str
    family: str
    context_length: int
    prefill_length: int
    parameters: Parameters
    bits_per_weight: float  # including float16 scales and zero points
    artifact: ArtifactBytes
    caches: CacheBytes
    run: RunBytes
    export_peak_bytes: int  # with calibration, if `counts_calibration`
    phones: tuple[PhoneVerdict, ...]
    reason: str | None = None  # why this recipe; None if the user chose it
    counts_calibration: bool = True  # False if it reads text, and torch to estimate that is missing
    calibration: CalibrationTime | None = None  # None without text, or if it isn't counted
    device: str = HOST  # what runs the reference and calibration
    device_peak_bytes: int | None = None  # of its own memory; None for the host


def make_plan(
    config: GemmaConfig,
    recipe: str,
    formats: Mapping[str, Format],
    caches: Sequence[LayerCache],
    geometry: Geometry,
    target: str,
    cache: str | None = None,
    device: str = HOST,
) -> Plan:
    """Compute the plan from the shapes alone. `cache` is the caches' type, or None; `device` runs
    the reference.
    """
    kind = kind_of(device)
    evaluating = blocks_bytes(kind) + _goldens_bytes(config, caches, geometry)
    on_device = None if kind == HOST else evaluating
    parameters = count_parameters(config)
    costs = target_spec(target).costs
    artifact = measure_artifact(config, formats, geometry.context_length, costs)
    cache_bytes = _caches(caches, geometry.context_length, cache_dtype(target, cache))
    run = _run(config, formats, caches, geometry, artifact, costs, cache_bytes.total)
    return Plan(
        target=target,
        recipe=recipe,
        family=config.family,
        context_length=geometry.context_length,
        prefill_length=geometry.prefill_length,
        parameters=parameters,
        bits_per_weight=bits_per_weight(config, formats),
        artifact=artifact,
        caches=cache_bytes,
        run=run,
        export_peak_bytes=_export_peak(config, caches, geometry, costs),
        device=HOST if kind == HOST else device,
        device_peak_bytes=on_device,
        phones=judge_phones(run.total),
    )


def judge_phones(needed: int) -> tuple[PhoneVerdict, ...]:
    """Verdicts for what an app needs, in bytes."""
    return tuple(_phone(gigabytes, needed) for gigabytes in _PHONES_GB)


def count_parameters(config: GemmaConfig) -> Parameters:
    """Numbers of weights, by part."""
    counts: dict[Component, int] = dict.fromkeys(_COMPONENTS, 0)
    for name, shape in config.tensor_shapes().items():
        counts[_component(name, shape)] += math.prod(shape)
    return Parameters(**counts, total=config.parameters)


def _component(name: str, shape: tuple[int, ...]) -> Component:
    if len(shape) == 1:
        return "norms"
    if name in _TABLES:
        return _TABLES[name]
    return "attention" if ".self_attn." in name else "mlp"


def measure_artifact(
    config: GemmaConfig, formats: Mapping[str, Format], context_length: int, costs: Costs
) -> ArtifactBytes:
    """Bytes of the weight files, by part."""
    counts: dict[Component, int] = dict.fromkeys((*_COMPONENTS, "ropes"), 0)
    pages = 0
    for component, length in _regions(config, formats, context_length, costs):
        counts[component] += length
        pages += -(-length // costs.alignment) * costs.alignment
    return ArtifactBytes(**counts, padding=pages - sum(counts.values()), total=pages)


def _regions(
    config: GemmaConfig, formats: Mapping[str, Format], context_length: int, costs: Costs
) -> Iterator[tuple[Component, int]]:
    """Component and bytes of every tensor in the data file, as `targets/onnx/ops.py` writes it."""
    shapes = config.tensor_shapes()
    for names in config.products():
        for stack in stacks(names, lambda name: formats.get(name, FLOAT)):
            fmt = formats.get(stack[0], FLOAT)
            rows, width = sum(shapes[name][0] for name in stack), shapes[stack[0]][1]
            component = _component(stack[0], shapes[stack[0]])
            if component in ("table", "per_layer") and costs.half_table and not fmt.is_float:
                yield component, rows * width * 2
                continue
            for columns, own in fmt.pieces("", width).values():
                inputs = len(range(width)[columns])
                for length in _matrix_regions(rows, inputs, own, costs.float_bytes):
                    yield component, length
    for shape in shapes.values():
        if len(shape) == 1:
            yield "norms", shape[0] * costs.float_bytes
    ropes = {(x.rope, x.head_dim) for x in config.layers} if costs.has_ropes else ()
    for _, width in ropes:
        for _ in ("cos", "sin"):
            yield "ropes", context_length * width // 2 * FLOAT_BYTES


def _matrix_regions(
    rows: int, width: int, fmt: Format, float_bytes: int, scale_bytes: int = _SCALE_BYTES
) -> list[int]:
    """Bytes of codes, scales and zero points."""
    if fmt.is_float:
        return [rows * width * float_bytes]
    groups = width // fmt.group
    zeros = [rows * ((groups * fmt.bits + 7) // 8)] if fmt.asymmetric else []
    return [rows * width * fmt.bits // 8, rows * groups * scale_bytes, *zeros]


def held_bytes(config: GemmaConfig, name: str, fmt: Format, float_bytes: int = FLOAT_BYTES) -> int:
    """Bytes of a matrix in memory. onnxruntime converts scales to float32 when it loads."""
    rows, width = config.tensor_shapes()[name]
    return sum(
        sum(_matrix_regions(rows, len(range(width)[columns]), own, float_bytes, FLOAT_BYTES))
        for columns, own in fmt.pieces(name, width).values()
    )


def _caches(caches: Sequence[LayerCache], context_length: int, dtype: str) -> CacheBytes:
    width = CACHE_WIDTHS[dtype]
    local = global_ = uncut = 0
    for cache in caches:
        size = cache.elements * width
        uncut += size // cache.slots * context_length
        if cache.kind is AttentionKind.LOCAL:
            local += size
        else:
            global_ += size
    saved = uncut - local - global_
    amount = format_bytes(saved) if saved else "0 MiB"
    return CacheBytes(
        dtype=dtype,
        local=local,
        full=global_,
        saved=saved,
        note=f"ring saves {amount} at this context",
        total=local + global_,
    )


def _run(
    config: GemmaConfig,
    formats: Mapping[str, Format],
    caches: Sequence[LayerCache],
    geometry: Geometry,
    artifact: ArtifactBytes,
    costs: Costs,
    cached: int,
) -> RunBytes:
    fmt = formats.get(TABLE, FLOAT)
    held = {n: held_bytes(config, n, f, costs.float_bytes) for n, f in formats.items()}
    # Lookups read the table as loaded: floats, or codes with float32 scales.
    table_codes = config.vocab_size * (config.hidden_size * fmt.bits + fmt.int8_columns * 4) // 8
    mapped = artifact.norms + artifact.ropes
    mapped += 0 if costs.maps_per_layer else artifact.per_layer
    # A tied table is packed for the head's product too; its scales are shared with the lookup.
    is_kept = fmt.is_float or costs.table_kept or not config.tied
    mapped += held[TABLE] if is_kept else held[TABLE] - table_codes
    looked_up = {PER_LAYER_TABLE} if config.tied else {PER_LAYER_TABLE, TABLE}
    multiplied = sum(size for name, size in held.items() if name not in looked_up)
    prepacked = round(multiplied * (1.0 if fmt.is_float else costs.packed))
    packing = 0 if fmt.is_float else round(held[config.head] * costs.packing)
    activations = _activation_bytes(config, caches, geometry.prefill_length)
    resident = costs.runtime + mapped + prepacked
    return RunBytes(
        mapped=mapped,
        prepacked=prepacked,
        caches=cached,
        activations=activations,
        runtime=costs.runtime,
        loading=resident + packing,
        total=max(resident + packing, resident + cached + activations),
    )


def _activation_bytes(config: GemmaConfig, caches: Sequence[LayerCache], tokens: int) -> int:
    """Bytes of live activations: MLP (gate, up, product), attention scores, logits."""
    scores = config.heads * tokens * max(cache.slots for cache in caches)
    alive = tokens * widest_row(config) + scores + config.vocab_size
    return _ARENA * alive * FLOAT_BYTES


def widest_row(config: GemmaConfig) -> int:
    """Numbers that are alive at once for each token, at most."""
    ffn = max(layer.ffn for layer in config.layers)
    return 5 * ffn + 4 * config.hidden_size + 3 * config.per_layer * len(config.kinds)


def _export_peak(
    config: GemmaConfig, caches: Sequence[LayerCache], geometry: Geometry, costs: Costs
) -> int:
    """Peak of parsing the tokenizer, evaluating the goldens, computing rope tables and writing.

    Only the caches in ExecuTorch's frame grow with the number of layers.
    """
    context_length = geometry.context_length
    widest_head = max(layer.head_dim for layer in config.layers)
    # float64 angle and cosine, float32 result
    ropes = context_length * widest_head // 2 * (8 + 8 + 4)
    tokenizer = config.vocab_size * _TOKENIZER_BYTES
    goldens = _goldens_bytes(config, caches, geometry)
    working = tokenizer + blocks_bytes(HOST) + max(goldens, ropes)
    writing = round(costs.weight_exported * config.parameters)
    writing += costs.caches_exported * sum(cache.elements for cache in caches) * FLOAT_BYTES
    return costs.exporting + max(working, config.vocab_size * TOKENIZER_PARSING, writing)


def blocks_bytes(kind: str) -> int:
    """Bytes of the blocks of rows that are held at a time on a kind of device."""
    return grain(kind).held * _BLOCK_COPIES * BLOCK_ELEMENTS * FLOAT_BYTES


def _goldens_bytes(config: GemmaConfig, caches: Sequence[LayerCache], geometry: Geometry) -> int:
    """Bytes of evaluating the goldens, beside the blocks of weights."""
    judged = len(PROMPTS) * min(JUDGED, geometry.context_length)
    logits = _LOGITS_COPIES * judged * config.vocab_size * FLOAT_BYTES
    long = long_length(config, geometry.context_length, [caches])
    group = max(layer.heads // layer.kv_heads for layer in config.layers)
    scores = _WIDEST_COPIES * group * long**2 * FLOAT_BYTES
    widest = _WIDEST_COPIES * max(judged, long) * widest_row(config) * FLOAT_BYTES
    return widest + max(logits, scores)


def _phone(gigabytes: int, needed: int) -> PhoneVerdict:
    budget = round(gigabytes * _GIB * _BUDGET_SHARE)
    verdict: Verdict = "does not fit"
    if needed <= budget:
        verdict = "fits" if needed <= budget * _COMFORT else "tight"
    return PhoneVerdict(gigabytes, budget, needed, verdict)
