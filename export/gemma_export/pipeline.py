"""From a checkpoint to a bundle. `export_bundles` is the whole story."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.checkpoint.open import open_checkpoint, planned_config
from gemma_export.checkpoint.prequantized import require_exact, resolve_recipe
from gemma_export.config import Family, GemmaConfig
from gemma_export.memory import MemoryCeiling, release_memory
from gemma_export.parallel import one_thread_each
from gemma_export.plan import Plan, make_plan
from gemma_export.progress import Reporter, guarded
from gemma_export.prompts import golden_prompts
from gemma_export.quantize.recipe import Recipe, bits_per_weight
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_export.reference import Reference, record_reference
from gemma_export.targets import (
    NO_OPTIONS,
    Artifact,
    ExportJob,
    Geometry,
    Target,
    TargetOptions,
    load_targets,
)
from gemma_export.teacher import passes, record_teacher
from gemma_runtime.bundle import (
    MANIFEST,
    Bundle,
    check_writable,
    describe_files,
    staged_folder,
)
from gemma_runtime.errors import CheckpointError, TargetError
from gemma_runtime.goldens import save_goldens
from gemma_runtime.machine import peak_rss_bytes
from gemma_runtime.manifest import (
    SCHEMA_VERSION,
    LayerCache,
    Manifest,
    Model,
    Quantization,
)
from gemma_runtime.teacher import (
    LONGEST,
    TEACHER,
    TeacherSegment,
    read_segments,
    save_teacher,
)

_TOKENIZER, _GOLDENS = "tokenizer.json", "goldens.json"
_TURN_END = "<end_of_turn>"
_DEFAULT_CONTEXT, _DEFAULT_PREFILL = 4096, 512


@dataclass(frozen=True, slots=True)
class ExportRequest:
    targets: tuple[str, ...]
    recipe: Recipe
    checkpoint: str | None = None  # None: the official one of `size`
    size: str | None = None
    family: Family | None = None
    config_file: Path | None = None  # shape of random weights
    context_length: int | None = None
    prefill_length: int | None = None
    full_cache: bool = False
    options: TargetOptions = NO_OPTIONS
    output: Path | None = None
    max_ram: int | None = None  # bytes
    force: bool = False
    require_exact: bool = False
    eval_text: Path | None = None  # whose teacher every bundle shall hold


@dataclass(frozen=True, slots=True)
class ExportResult:
    bundle: Bundle
    seconds: float  # of the whole request, shared work included
    peak_rss_bytes: int


def export_bundles(request: ExportRequest, report: Reporter) -> list[ExportResult]:
    """Write one bundle per target, all from one quantized store.

    Everything cheap is checked before a weight is read; a bundle appears whole or not at all.
    """
    started = time.monotonic()
    targets = load_targets(request.targets, request.options)
    checkpoint = open_checkpoint(
        request.checkpoint, request.size, request.family, request.config_file
    )
    resolved = resolve_recipe(request.recipe, checkpoint)
    if request.require_exact:
        require_exact(resolved)
    request = replace(request, recipe=resolved.recipe)
    geometry = _geometry(request, checkpoint.config)
    outputs = [_output(request, checkpoint, target.name) for target in targets]
    for output in outputs:
        check_writable(output, request.force)
    ceiling = MemoryCeiling(request.max_ram)
    for target in targets:
        ceiling.check_estimate(_plan(checkpoint.config, request, target).export_peak_bytes)
    for note in (*checkpoint.notes, *resolved.notes):
        report.note(note)

    layouts = [target.caches(checkpoint.config, geometry) for target in targets]
    text = _read_text(checkpoint, geometry, layouts, request.eval_text)
    with one_thread_each():
        store = _quantize(checkpoint, request.recipe, report, ceiling)
        reference = _reference(checkpoint, store, text.prompts, report, ceiling)
        teacher = _teacher(checkpoint, text.segments, report, ceiling)
    results = []
    for target, output in zip(targets, outputs, strict=True):
        with staged_folder(output, request.force) as folder:
            work = _Work(
                checkpoint, text, store, request.recipe, geometry, reference, folder, teacher
            )
            artifact = _write(target, work, report, ceiling)
            manifest = _manifest(work, artifact, {**artifact.roles, **_write_sidecars(work)})
            (folder / MANIFEST).write_bytes(manifest.to_json())
            ceiling.check_peak()
        elapsed = time.monotonic() - started
        results.append(ExportResult(Bundle(output, manifest), elapsed, peak_rss_bytes()))
    return results


def plan_exports(request: ExportRequest) -> list[Plan]:
    """What each bundle would weigh and need, without reading a weight."""
    targets = load_targets(request.targets, request.options)
    if request.checkpoint and any(rule.rounding == "kept" for rule in request.recipe.rules):
        checkpoint = open_checkpoint(request.checkpoint, request.size, request.family)
        request = replace(request, recipe=resolve_recipe(request.recipe, checkpoint).recipe)
    config = planned_config(request.checkpoint, request.size, request.family, request.config_file)
    return [_plan(config, request, target) for target in targets]


@dataclass(frozen=True, slots=True)
class _Work:
    """All that one bundle is made from."""

    checkpoint: Checkpoint
    text: "_Text"
    store: QuantizedStore
    recipe: Recipe
    geometry: Geometry
    reference: Reference
    folder: Path
    teacher: list[TeacherSegment]  # empty without --eval-text


@dataclass(frozen=True, slots=True)
class _Text:
    """What the export needs of the tokenizer, which itself takes half a gigabyte."""

    files: TokenizerFiles | None  # random weights have none
    prompts: Mapping[str, list[int]]  # of the goldens
    segments: Mapping[str, list[int]]  # of --eval-text
    turn_end: int | None


def _read_text(
    checkpoint: Checkpoint,
    geometry: Geometry,
    layouts: Sequence[Sequence[LayerCache]],
    eval_text: Path | None,
) -> _Text:
    texts = read_segments(eval_text) if eval_text else {}
    files = checkpoint.tokenizer()
    encoder = _load_encoder(checkpoint, files) if files else None
    prompts = golden_prompts(checkpoint.config, encoder, geometry.context_length, layouts)
    turn_end = encoder.token_to_id(_TURN_END) if encoder else None
    segments = _encode_segments(checkpoint, encoder, texts, geometry) if texts else {}
    del encoder
    release_memory()
    return _Text(files, prompts, segments, turn_end)


def _encode_segments(
    checkpoint: Checkpoint, encoder: Tokenizer | None, texts: Mapping[str, str], geometry: Geometry
) -> dict[str, list[int]]:
    """As the runtime encodes them, or the teacher would not be found again."""
    if encoder is None:
        raise CheckpointError(f"{checkpoint.id} has no tokenizer, so --eval-text can't be read")
    encoder.encode_special_tokens = True
    longest, bos = min(LONGEST, geometry.context_length), checkpoint.config.bos_token
    found = {
        name: [bos, *encoder.encode(text, add_special_tokens=False).ids][:longest]
        for name, text in texts.items()
    }
    return {name: ids for name, ids in found.items() if len(ids) > 1}


def _load_encoder(checkpoint: Checkpoint, files: TokenizerFiles) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(files.tokenizer_json)
    except Exception as error:  # what tokenizers raises has no type of its own
        raise CheckpointError(f"{checkpoint.id}: tokenizer.json can't be read: {error}") from error


def _geometry(request: ExportRequest, config: GemmaConfig) -> Geometry:
    longest = config.max_position
    context = request.context_length or min(_DEFAULT_CONTEXT, longest)
    prefill = request.prefill_length or min(_DEFAULT_PREFILL, context)
    if not 2 <= context <= longest:
        raise TargetError(f"--context is {context}; this model reads 2 to {longest} tokens")
    if not 1 <= prefill <= context:
        raise TargetError(f"--prefill is {prefill}; it can be 1 to the context of {context}")
    return Geometry(context, prefill, request.full_cache)


def _output(request: ExportRequest, checkpoint: Checkpoint, target: str) -> Path:
    """`--output` itself for one target, a folder in it for each of several."""
    model = Path(checkpoint.id).name.removesuffix(".gguf").replace(":", "-")
    name = f"{model}-{request.recipe.name}-{target}"
    if request.output is None:
        return Path("out") / name
    return request.output if len(request.targets) == 1 else request.output / name


def _plan(config: GemmaConfig, request: ExportRequest, target: Target) -> Plan:
    geometry = _geometry(request, config)
    formats = request.recipe.formats(config)
    target.check(formats, geometry)
    return make_plan(config, formats, target.caches(config, geometry), geometry, target.name)


def _quantize(
    checkpoint: Checkpoint, recipe: Recipe, report: Reporter, ceiling: MemoryCeiling
) -> QuantizedStore:
    with report.stage("quantize", checkpoint.config.parameters * 4) as tick:
        return open_or_build_store(checkpoint, recipe, guarded(tick, ceiling))


def _reference(
    checkpoint: Checkpoint,
    store: QuantizedStore,
    prompts: Mapping[str, list[int]],
    report: Reporter,
    ceiling: MemoryCeiling,
) -> Reference:
    passes = 2 * len({len(prompt) for prompt in prompts.values()})
    with report.stage("reference", checkpoint.config.parameters * 4 * passes) as tick:
        return record_reference(checkpoint, store, prompts, guarded(tick, ceiling))


def _teacher(
    checkpoint: Checkpoint,
    segments: Mapping[str, list[int]],
    report: Reporter,
    ceiling: MemoryCeiling,
) -> list[TeacherSegment]:
    if not segments:
        return []
    total = checkpoint.config.parameters * 4 * passes(list(segments))
    with report.stage("teacher", total) as tick:
        return record_teacher(checkpoint, segments, guarded(tick, ceiling))


def _write(target: Target, work: _Work, report: Reporter, ceiling: MemoryCeiling) -> Artifact:
    config = work.checkpoint.config
    stop_tokens = _stop_tokens(config, work.text.turn_end)
    peak = work.reference.headroom.max_abs
    job = ExportJob(config, work.store, work.geometry, stop_tokens, peak, work.checkpoint)
    total = round(config.parameters * bits_per_weight(config, work.store.formats) / 8)
    with report.stage(target.name, total) as tick:
        return target.write(job, work.folder, guarded(tick, ceiling))


def _write_sidecars(work: _Work) -> dict[str, str]:
    """Tokenizer, goldens and teacher; returns which file plays which role."""
    roles = {"goldens": _GOLDENS}
    save_goldens(work.folder / _GOLDENS, work.reference.goldens)
    if work.teacher:
        roles["teacher"] = TEACHER
        save_teacher(work.folder / TEACHER, work.teacher)
    if work.text.files is not None:
        (work.folder / _TOKENIZER).write_bytes(work.text.files.tokenizer_json)
        roles["tokenizer"] = _TOKENIZER
    return roles


def _manifest(work: _Work, artifact: Artifact, roles: dict[str, str]) -> Manifest:
    checkpoint, config, formats = work.checkpoint, work.checkpoint.config, work.store.formats
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=Model(
            id=checkpoint.id,
            family=config.family,
            parameters=config.parameters,
            revision=checkpoint.revision,
            digest=checkpoint.digest(),
        ),
        target=artifact.runtime,
        quantization=Quantization(
            recipe=work.recipe.name,
            bits_per_weight=bits_per_weight(config, formats),
            codes_digest=work.store.codes_digest,
            tensors={name: str(form) for name, form in formats.items()},
        ),
        vocab_size=config.vocab_size,
        context_length=work.geometry.context_length,
        prefill_length=work.geometry.prefill_length,
        bos_token=config.bos_token,
        stop_tokens=_stop_tokens(config, work.text.turn_end),
        chat_template=work.text.files.chat_template if work.text.files else None,
        layers=artifact.caches,
        cache_dtype=artifact.cache_dtype,
        graphs=artifact.graphs,
        headroom=replace(work.reference.headroom, factor=artifact.headroom_factor),
        quality=work.reference.quality,
        files=dict(describe_files(work.folder)),
        roles=roles,
        tools={name: metadata.version(name) for name in ("gemma-export", *artifact.tools)},
        ropes=dict(config.ropes),
    )


def _stop_tokens(config: GemmaConfig, turn_end: int | None) -> tuple[int, ...]:
    """The config's end tokens, and the end of a turn, which base models' configs leave out."""
    return tuple(dict.fromkeys((*config.eos_tokens, *([] if turn_end is None else [turn_end]))))
