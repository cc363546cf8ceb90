"""What an export gave, for the console and for JSON."""

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from gemma_export.embedding.pipeline import EmbeddingResult
from gemma_export.pipeline import ExportResult
from gemma_export.targets import target_spec
from gemma_runtime.embedding_bundle import VectorAgreement
from gemma_runtime.machine import format_bytes
from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.worst_golden import BY_LANGUAGE, WorstGolden, worst_of_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Export:
    """What every export gave."""

    bundle: str
    target: str
    model: str
    recipe: str
    reason: str | None  # why --quant auto chose it
    bits_per_weight: float
    codes_digest: str
    bytes: int
    context_length: int
    seconds: float
    peak_rss_bytes: int
    device: str  # what ran the reference and calibration
    peak_device_bytes: int | None  # of its own memory; None for the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(_Export):
    """Results of one export."""

    quality: Agreement  # quantized against float32 weights, both run by the reference
    worst_golden: WorstGolden | None  # where that is worst
    cache: str  # type of the KV caches
    cache_quality: Agreement | None  # int8 against float32 caches, both with quantized weights


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSummary(_Export):
    """Results of one export of an encoder."""

    dimensions: int
    prompts: tuple[str, ...]  # names
    quality: VectorAgreement  # quantized against float32 weights, both run by the reference


def summarize(result: ExportResult) -> Summary:
    manifest = result.bundle.manifest
    return Summary(
        **_common(result),
        quality=manifest.quality,
        worst_golden=worst_of_weights(result.bundle),
        cache=manifest.cache_dtype,
        cache_quality=manifest.int8_caches.quality if manifest.int8_caches else None,
    )


def summarize_embedding(result: EmbeddingResult) -> EmbeddingSummary:
    manifest = result.bundle.manifest
    return EmbeddingSummary(
        **_common(result),
        dimensions=manifest.dimensions,
        prompts=tuple(manifest.prompts),
        quality=manifest.quality,
    )


def _common(result: ExportResult | EmbeddingResult) -> dict[str, Any]:
    """The fields of `_Export`."""
    manifest = result.bundle.manifest
    return {
        "bundle": str(result.bundle.directory),
        "target": manifest.target.name,
        "model": manifest.model.id,
        "recipe": manifest.quantization.recipe,
        "reason": result.reason,
        "bits_per_weight": manifest.quantization.bits_per_weight,
        "codes_digest": manifest.quantization.codes_digest,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "context_length": manifest.context_length,
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "device": result.device,
        "peak_device_bytes": result.peak_device_bytes,
    }


def render_summary(summary: Summary | EmbeddingSummary) -> RenderableType:
    """A table of labels and values under the bundle's folder."""
    table = Table(show_header=False, box=None, title=summary.bundle, title_justify="left")
    for label, value in _lines(summary):
        table.add_row(label, value)
    return table


def _lines(summary: Summary | EmbeddingSummary) -> list[tuple[str, str]]:
    if isinstance(summary, EmbeddingSummary):
        return _embedding_lines(summary)
    caches = summary.cache_quality
    of_caches = f"; int8 caches alone: {_distance(caches)}" if caches else ""
    return [
        ("model", summary.model),
        ("weights", f"{summary.recipe}, {summary.bits_per_weight:.2f} bits"),
        ("size", format_bytes(summary.bytes)),
        ("context", f"{summary.context_length} tokens"),
        (
            "quality",
            f"{_distance(summary.quality)} of the weights alone, to float32 ones, over "
            f"{summary.quality.positions} golden tokens" + of_caches,
        ),
        *_worst(summary),
        ("export", _cost(summary)),
        ("next", target_spec(summary.target).next_step.format(bundle=summary.bundle)),
    ]


def _worst(summary: Summary) -> list[tuple[str, str]]:
    """What the mean over all goldens hides."""
    if summary.worst_golden is None:
        return []
    hint = "" if summary.target == "hf" else f"; {BY_LANGUAGE}"  # which evaluates no such folders
    return [("", f"{summary.worst_golden}{hint}")]


def _embedding_lines(summary: EmbeddingSummary) -> list[tuple[str, str]]:
    quality = summary.quality
    return [
        ("model", summary.model),
        ("weights", f"{summary.recipe}, {summary.bits_per_weight:.2f} bits"),
        ("size", format_bytes(summary.bytes)),
        (
            "vectors",
            f"{summary.dimensions} numbers; texts of up to {summary.context_length} tokens",
        ),
        ("prompts", ", ".join(summary.prompts) or "none"),
        (
            "quality",
            f"cosine {quality.mean_cosine:.5f}, least {quality.min_cosine:.5f}, of the weights "
            f"alone, to float32 ones, over {quality.texts} golden texts",
        ),
        ("export", _cost(summary)),
        ("next", f"gemma-runtime verify {summary.bundle}"),
    ]


def _cost(summary: _Export) -> str:
    """Time and peak memory of an export."""
    text = f"{summary.seconds:.1f} s, peak {format_bytes(summary.peak_rss_bytes)}"
    if summary.peak_device_bytes is None:
        return text
    return f"{text}, and {format_bytes(summary.peak_device_bytes)} of {summary.device}"


def _distance(quality: Agreement) -> str:
    return f"KL {quality.mean_kl:.4f}, top-1 {quality.top1:.1%}"
