"""Exports an encoder to a bundle that gives vectors."""

import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from gemma_export.checkpoint import Checkpoint, describe_model
from gemma_export.checkpoint.sentence_folder import EncoderFiles
from gemma_export.computing import DeviceCeiling, unused_note
from gemma_export.embedding.plan import plan_encoder
from gemma_export.embedding.reference import PASSES, EncoderReference, record_vectors
from gemma_export.embedding.request import (
    choose_encoder_recipe,
    encoder_context,
    encoder_files,
)
from gemma_export.embedding.text import EncoderText, read_encoder_text
from gemma_export.memory import MemoryCeiling, release_memory
from gemma_export.progress import Reporter, guarded
from gemma_export.quantize.kept import require_exact, resolve_recipe
from gemma_export.quantize.recipe import (
    Recipe,
    bits_per_weight,
    tensor_formats,
    write_recipe,
)
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_export.ranks import refuse_ranks
from gemma_export.request import ExportRequest, bundle_folder
from gemma_runtime.bundle import MANIFEST, check_writable, describe_files, staged_folder
from gemma_runtime.embedding.verify import save_embedding_goldens
from gemma_runtime.embedding_bundle import EmbeddingBundle, EmbeddingManifest
from gemma_runtime.machine import peak_rss_bytes
from gemma_runtime.manifest import ENCODER, SCHEMA_VERSION, Graph, Quantization

_TOKENIZER, _GOLDENS, _RECIPE = "tokenizer.json", "goldens.json", "recipe.yaml"


@dataclass(frozen=True, slots=True)
class EmbeddingResult:
    bundle: EmbeddingBundle
    seconds: float  # since the request started
    peak_rss_bytes: int
    device: str  # what ran the reference
    peak_device_bytes: int | None  # of its own memory; None for the host
    reason: str | None  # why this recipe; None if the request named one


def export_encoder(
    request: ExportRequest,
    checkpoint: Checkpoint,
    device: torch.device,
    report: Reporter,
    started: float,
) -> EmbeddingResult:
    """Write one bundle. It is written completely or not at all."""
    refuse_ranks("exporting a model that gives vectors")
    choice = choose_encoder_recipe(request)
    encoder = encoder_files(checkpoint)
    resolved = resolve_recipe(choice.recipe, checkpoint)
    if request.require_exact:
        require_exact(resolved)
    recipe, context = resolved.recipe, encoder_context(request, checkpoint.config, encoder)
    output = bundle_folder(request, recipe, checkpoint, request.targets[0])
    check_writable(output, request.force)
    memory = DeviceCeiling(device, request.max_vram)
    ceiling = MemoryCeiling(request.max_ram, memory)
    plan = plan_encoder(checkpoint.config, recipe, context, request.targets[0], choice.reason)
    ceiling.check_estimate(plan.export_peak_bytes)
    for note in (*checkpoint.notes, *choice.notes, *resolved.notes, *unused_note(device)):
        report.note(note)

    text = read_encoder_text(checkpoint, encoder, context)
    for note in text.files.notes if text.files is not None else ():
        report.note(note)
    release_memory()
    size = checkpoint.config.parameters * 4
    with report.stage("quantize", size) as tick:
        store = open_or_build_store(checkpoint, recipe, guarded(tick, ceiling), None, report.note)
    with report.stage("reference", size * PASSES * len(text.goldens)) as tick:
        tick = guarded(tick, ceiling)
        reference = record_vectors(checkpoint, store, text.goldens, tick, device)
    with staged_folder(output, request.force) as folder:
        work = _Work(checkpoint, encoder, store, recipe, context, text, reference, folder)
        graphs = _write(work, report, ceiling)
        manifest = _manifest(work, graphs, _write_sidecars(work))
        (folder / MANIFEST).write_bytes(manifest.to_json())
        ceiling.check_peak()
    return EmbeddingResult(
        EmbeddingBundle(output, manifest), time.monotonic() - started, peak_rss_bytes(),
        str(device), memory.peak_bytes(), choice.reason,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything that the bundle is made from."""

    checkpoint: Checkpoint
    encoder: EncoderFiles | None
    store: QuantizedStore
    recipe: Recipe
    context: int
    text: EncoderText
    reference: EncoderReference
    folder: Path


def _write(work: _Work, report: Reporter, ceiling: MemoryCeiling) -> dict[str, Graph]:
    from gemma_export.targets.onnx.encoder import write_encoder

    config, store = work.checkpoint.config, work.store
    total = round(config.parameters * bits_per_weight(config, store.formats) / 8)
    with report.stage("onnx", total) as tick:
        return write_encoder(config, store, work.context, work.folder, guarded(tick, ceiling))


def _write_sidecars(work: _Work) -> dict[str, str]:
    """Write goldens, recipe and tokenizer; returns role → file name."""
    roles = {"goldens": _GOLDENS}
    save_embedding_goldens(work.folder / _GOLDENS, work.reference.goldens)
    (work.folder / _RECIPE).write_text(write_recipe(work.recipe), "utf-8")
    if work.text.files is not None:
        (work.folder / _TOKENIZER).write_bytes(work.text.files.tokenizer_json)
        roles["tokenizer"] = _TOKENIZER
    return roles


def _manifest(work: _Work, graphs: dict[str, Graph], roles: dict[str, str]) -> EmbeddingManifest:
    from gemma_export.targets.onnx.encoder import RUNTIME, TOOLS

    checkpoint, config, formats = work.checkpoint, work.checkpoint.config, work.store.formats
    return EmbeddingManifest(
        schema_version=SCHEMA_VERSION,
        kind=ENCODER,
        model=describe_model(checkpoint),
        target=RUNTIME,
        quantization=Quantization(
            recipe=work.recipe.name,
            bits_per_weight=bits_per_weight(config, formats),
            codes_digest=work.store.codes_digest,
            tensors=tensor_formats(config, formats),
            calibration=None,
        ),
        vocab_size=config.vocab_size,
        context_length=work.context,
        dimensions=config.dimensions,
        before=work.text.before,
        after=work.text.after,
        prompts=dict(work.encoder.prompts) if work.encoder else {},
        default_prompt=work.encoder.default_prompt if work.encoder else None,
        graphs=graphs,
        quality=work.reference.quality,
        files=dict(describe_files(work.folder)),
        roles=roles,
        tools={name: metadata.version(name) for name in ("gemma-export", *TOOLS)},
    )
