"""Exports a checkpoint to bundles: `export_bundles` runs all steps in order."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from gemma_export import shards
from gemma_export.checkpoint import Checkpoint, describe_model
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.computing import DeviceCeiling, choose_device, computing, unused_note
from gemma_export.device import kind_of
from gemma_export.embedding.pipeline import EmbeddingResult, export_encoder
from gemma_export.memory import MemoryCeiling
from gemma_export.model.config import GemmaConfig
from gemma_export.model.int8_cache import LayerScales, scales_digest
from gemma_export.parallel import one_thread_each
from gemma_export.progress import QuietReporter, Reporter, guarded, guarded_stage
from gemma_export.quantize.calibrate.budget import Budget, spend_budget
from gemma_export.quantize.calibrate.cache_scales import (
    SEQUENCES,
    measure_caches,
    measured_bytes,
    measured_scales,
)
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.kept import require_exact, resolve_recipe
from gemma_export.quantize.recipe import Recipe, bits_per_weight, tensor_formats, write_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_export.ranks import count_local_ranks, count_ranks, refuse_ranks
from gemma_export.request import (
    ExportRequest,
    bundle_folder,
    check_request,
    export_geometry,
    find_choice,
    plan_export,
)
from gemma_export.sidecars.kept_teacher import kept_teacher
from gemma_export.sidecars.reference import Reference, record_reference
from gemma_export.sidecars.reference import passes as reference_passes
from gemma_export.sidecars.text import ExportText, WantedText, read_text
from gemma_export.targets import (
    Artifact,
    ExportJob,
    Geometry,
    Target,
    load_targets,
    require_packages,
    target_spec,
)
from gemma_runtime.bundle import MANIFEST, Bundle, check_writable, describe_files, staged_folder
from gemma_runtime.cache import writable_cache
from gemma_runtime.errors import TargetError
from gemma_runtime.machine import peak_rss_bytes
from gemma_runtime.manifest import (
    SCHEMA_VERSION,
    CalibratedOn,
    Int8Caches,
    Manifest,
    Quantization,
)
from gemma_runtime.proof.goldens import save_goldens
from gemma_runtime.proof.teacher import TEACHER, TeacherSegment, save_teacher

_TOKENIZER, _GOLDENS, _RECIPE = "tokenizer.json", "goldens.json", "recipe.yaml"

__all__ = ["ExportRequest", "ExportResult", "export_bundles", "export_model"]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ExportResult:
    bundle: Bundle
    seconds: float  # since the request started, including work shared with other bundles
    peak_rss_bytes: int
    device: str  # what ran the reference and calibration
    peak_device_bytes: int | None  # of its own memory; None for the host
    reason: str | None = None  # why this recipe; None if the request named one


def export_bundles(request: ExportRequest, report: Reporter | None = None) -> list[ExportResult]:
    """Write one bundle per target, all from one quantized store. `report=None` prints nothing.

    All cheap checks run before weights are read. A bundle is written completely or not at all.
    Ranks of torchrun share the calibration; the first one then does the rest, and the others
    return nothing. Raises TargetError for an encoder: see `export_model`.
    """
    return _export(request, report, _refuse_encoder)


def export_model(
    request: ExportRequest, report: Reporter | None = None
) -> list[ExportResult | EmbeddingResult]:
    """Like `export_bundles`; for an encoder, write one bundle that gives vectors."""
    return _export(request, report, export_encoder)


def _export(
    request: ExportRequest,
    report: Reporter | None,
    on_encoder: Callable[[ExportRequest, Checkpoint, torch.device, Reporter, float], R],
) -> list[ExportResult | R]:
    started = time.monotonic()
    report = report if report is not None and shards.is_first() else QuietReporter()
    writable_cache()
    check_request(request)
    with shards.joined(kind_of(request.device)), one_thread_each():
        targets = load_targets(request.targets, request.options)
        for target in targets:
            require_packages(target.name)
        device = choose_device(request.device)
        checkpoint = shards.after_first(lambda: open_checkpoint(*request.model))
        if checkpoint.config.is_encoder:
            return [on_encoder(request, checkpoint, device, report, started)]
        made = _quantized(request, targets, checkpoint, device, report)
    if not shards.is_first():
        return []
    text, store, ceiling = made.text, made.store, made.ceiling
    with one_thread_each():
        scales = None
        if request.has_int8_caches and text.calibration is not None:
            space = Workspace(checkpoint, made.recipe, text.calibration, device)
            scales = _cache_scales(space, store, made.geometry.context_length, report, ceiling)
        reference = _reference(checkpoint, store, text.prompts, scales, device, report, ceiling)
        teacher = _teacher(checkpoint, text.segments, device, report, ceiling)
    results: list[ExportResult | R] = []
    for target, output in zip(targets, made.outputs, strict=True):
        with staged_folder(output, request.force) as folder:
            work = _Work(
                checkpoint, text, store, made.recipe, made.is_calibrated, made.geometry, scales,
                reference, folder, teacher,
            )  # fmt: skip
            artifact = _write(target, work, report, ceiling)
            manifest = _manifest(work, artifact, {**artifact.roles, **_write_sidecars(work)})
            (folder / MANIFEST).write_bytes(manifest.to_json())
            ceiling.check_peak()
        elapsed = time.monotonic() - started
        peaks = peak_rss_bytes(), str(device), made.memory.peak_bytes()
        results.append(ExportResult(Bundle(output, manifest), elapsed, *peaks, made.reason))
    return results


def _refuse_encoder(_request: ExportRequest, checkpoint: Checkpoint, *_others: object) -> NoReturn:
    raise TargetError(f"{checkpoint.id} gives vectors; export it with export_model")


@dataclass(frozen=True, slots=True)
class _Quantized:
    """A checkpoint's codes, and all that was checked and chosen before."""

    outputs: list[Path]  # by target
    memory: DeviceCeiling
    ceiling: MemoryCeiling
    geometry: Geometry
    text: ExportText
    recipe: Recipe
    reason: str | None  # why this recipe
    is_calibrated: bool  # whether codes depend on the calibration text
    store: QuantizedStore


def _quantized(
    request: ExportRequest,
    targets: Sequence[Target],
    checkpoint: Checkpoint,
    device: torch.device,
    report: Reporter,
) -> _Quantized:
    """Check and choose everything, then round the weights; all ranks together."""
    choice = find_choice(request, targets, checkpoint)
    resolved = resolve_recipe(choice.recipe, checkpoint)
    if request.require_exact:
        require_exact(resolved)
    recipe, plain = _plain_table(resolved.recipe, targets, checkpoint.config)
    is_calibrated = request.calibrates(recipe)
    _check_shared(recipe, is_calibrated)
    geometry = export_geometry(request, checkpoint.config)
    outputs = [bundle_folder(request, recipe, checkpoint, target.name) for target in targets]
    for output in outputs:
        check_writable(output, request.force)
    memory = DeviceCeiling(device, request.max_vram)
    ceiling = MemoryCeiling(request.max_ram, memory)
    for target in targets:
        plan = plan_export(checkpoint.config, request, recipe, target)
        ceiling.check_estimate(plan.export_peak_bytes, plan.device_peak_bytes)
    unused = unused_note(device) if request.reads_text(recipe) else ()
    for note in (*checkpoint.notes, *choice.notes, *resolved.notes, *plain, *unused):
        report.note(note)

    layouts = [target.caches(checkpoint.config, geometry) for target in targets]
    sources = WantedText(request.eval_text, request.reads_text(recipe), request.calibration)
    text = read_text(checkpoint, geometry.context_length, layouts, sources, report)
    if text.calibration is not None:
        shards.check_text(len(text.calibration.tokens))
    if request.bits is not None and text.calibration is not None:
        budget = Budget(recipe, request.bits)
        recipe = _spend(budget, targets, checkpoint, text.calibration, device, report, ceiling)
    store = _quantize(checkpoint, recipe, text.calibration, device, report, ceiling)
    return _Quantized(
        outputs, memory, ceiling, geometry, text, recipe, choice.reason, is_calibrated, store
    )


def _check_shared(recipe: Recipe, is_calibrated: bool) -> None:
    """Raise RankError if several ranks can't share the work."""
    if recipe.distilled and count_local_ranks() < count_ranks():
        refuse_ranks("distillation on several machines")  # they write into one file
    if not is_calibrated:
        refuse_ranks(f"rounding by {recipe.name}, which reads no calibration text,")


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything that one bundle is made from."""

    checkpoint: Checkpoint
    text: ExportText
    store: QuantizedStore
    recipe: Recipe
    is_calibrated: bool  # whether codes depend on the calibration text
    geometry: Geometry
    scales: list[LayerScales] | None  # of int8 caches
    reference: Reference
    folder: Path
    teacher: list[TeacherSegment]  # empty without --eval-text


def _plain_table(
    recipe: Recipe, targets: Sequence[Target], config: GemmaConfig
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that all targets can hold, with a note if the table is not smoothed for that."""
    plain = [t.name for t in targets if not target_spec(t.name).scales_table]
    if not plain or not recipe.smooths_table(config):
        return recipe, ()
    note = (
        f"embedding and head are not smoothed: {', '.join(plain)} can't divide looked-up rows by "
        "the factors"
    )
    return recipe.with_plain_table(), (note,)


def _spend(
    budget: Budget,
    targets: Sequence[Target],
    checkpoint: Checkpoint,
    calibration: Calibration,
    device: torch.device,
    report: Reporter,
    ceiling: MemoryCeiling,
) -> Recipe:
    """The recipe with int8 where the budget of `--bits` is best spent."""
    stage = guarded_stage(report, ceiling)
    splits_table = all(target_spec(target.name).divides_table for target in targets)
    return spend_budget(
        budget, checkpoint, calibration, stage, splits_table=splits_table, device=device,
        note=report.note,
    )  # fmt: skip


def _quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Calibration | None,
    device: torch.device,
    report: Reporter,
    ceiling: MemoryCeiling,
) -> QuantizedStore:
    if calibration is not None and recipe.is_calibrated:
        work = Workspace(checkpoint, recipe, calibration, device)
        calibrated = CalibratedWeights(work, guarded_stage(report, ceiling), report.note)
        return open_or_build_store(checkpoint, recipe, None, calibrated, report.note)
    with report.stage("quantize", checkpoint.config.parameters * 4) as tick:
        return open_or_build_store(checkpoint, recipe, guarded(tick, ceiling), None, report.note)


def _cache_scales(
    work: Workspace,
    store: QuantizedStore,
    context: int,
    report: Reporter,
    ceiling: MemoryCeiling,
) -> list[LayerScales]:
    with work.locked(report.note):
        if left := measured_bytes(work, context):
            with computing(work.device), report.stage("caches", left) as tick:
                measure_caches(work, store, context, guarded(tick, ceiling))
        return measured_scales(work, context)


def _reference(
    checkpoint: Checkpoint,
    store: QuantizedStore,
    prompts: Mapping[str, list[int]],
    scales: list[LayerScales] | None,
    device: torch.device,
    report: Reporter,
    ceiling: MemoryCeiling,
) -> Reference:
    passes = reference_passes(scales) * len({len(prompt) for prompt in prompts.values()})
    with report.stage("reference", checkpoint.config.parameters * 4 * passes) as tick:
        return record_reference(checkpoint, store, prompts, scales, guarded(tick, ceiling), device)


def _teacher(
    checkpoint: Checkpoint,
    segments: Mapping[str, list[int]],
    device: torch.device,
    report: Reporter,
    ceiling: MemoryCeiling,
) -> list[TeacherSegment]:
    if not segments:
        return []
    stage = guarded_stage(report, ceiling)
    return kept_teacher(checkpoint, segments, stage, report.note, device)


def _write(target: Target, work: _Work, report: Reporter, ceiling: MemoryCeiling) -> Artifact:
    config = work.checkpoint.config
    text = work.text
    job = ExportJob(
        config,
        work.store,
        work.geometry,
        text.stop_tokens,
        work.reference.headroom.max_abs,
        work.checkpoint,
        text.files,
        work.scales,
        work.reference.max_products,
    )
    total = round(config.parameters * bits_per_weight(config, work.store.formats) / 8)
    with report.stage(target.name, total) as tick:
        return target.write(job, work.folder, guarded(tick, ceiling))


def _write_sidecars(work: _Work) -> dict[str, str]:
    """Write goldens, teacher, recipe and tokenizer files; returns role → file name."""
    roles = {"goldens": _GOLDENS}
    save_goldens(work.folder / _GOLDENS, work.reference.goldens)
    if work.teacher:
        roles["teacher"] = TEACHER
        save_teacher(work.folder / TEACHER, work.teacher)
    (work.folder / _RECIPE).write_text(write_recipe(work.recipe), "utf-8")
    if work.text.files is not None:
        (work.folder / _TOKENIZER).write_bytes(work.text.files.tokenizer_json)
        roles["tokenizer"] = _TOKENIZER
    for role, file in work.text.phone_files.items():
        (work.folder / file.name).write_bytes(file.content)
        roles[role] = file.name
    return roles


def _manifest(work: _Work, artifact: Artifact, roles: dict[str, str]) -> Manifest:
    checkpoint, config, formats = work.checkpoint, work.checkpoint.config, work.store.formats
    text = work.text.calibration
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=describe_model(checkpoint),
        target=artifact.runtime,
        quantization=Quantization(
            recipe=work.recipe.name,
            bits_per_weight=bits_per_weight(config, formats),
            codes_digest=work.store.codes_digest,
            tensors=tensor_formats(config, formats),
            calibration=_calibrated_on(text) if text and work.is_calibrated else None,
        ),
        vocab_size=config.vocab_size,
        context_length=work.geometry.context_length,
        prefill_length=work.geometry.prefill_length,
        bos_token=config.bos_token,
        eos_token=work.text.eos_token,
        stop_tokens=work.text.stop_tokens,
        sampling=checkpoint.generation.sampling,
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
        int8_caches=_int8_caches(work),
    )


def _int8_caches(work: _Work) -> Int8Caches | None:
    text, quality = work.text.calibration, work.reference.cache_quality
    if work.scales is None or text is None or quality is None:
        return None
    measured_on = _calibrated_on(text.first(SEQUENCES))
    return Int8Caches(scales_digest(work.scales), measured_on, quality)


def _calibrated_on(calibration: Calibration) -> CalibratedOn:
    tokens = calibration.tokens.numel()
    return CalibratedOn(calibration.source, tokens, calibration.seed, calibration.digest)
