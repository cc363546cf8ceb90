"""What an encoder's export gave, for the console and for JSON."""

from dataclasses import dataclass
from typing import Protocol

from gemma_export.embedding.pipeline import EmbeddingResult
from gemma_runtime.embedding_bundle import VectorAgreement
from gemma_runtime.machine import format_bytes


@dataclass(frozen=True, slots=True)
class EmbeddingSummary:
    """Results of one export."""

    bundle: str
    target: str
    model: str
    recipe: str
    reason: str | None  # why --quant auto chose it
    bits_per_weight: float
    codes_digest: str
    bytes: int
    context_length: int
    dimensions: int
    prompts: tuple[str, ...]  # names
    quality: VectorAgreement  # quantized against float32 weights, both run by the reference
    seconds: float
    peak_rss_bytes: int
    device: str  # what ran the reference
    peak_device_bytes: int | None  # of its own memory; None for the host


def summarize_embedding(result: EmbeddingResult) -> EmbeddingSummary:
    manifest = result.bundle.manifest
    return EmbeddingSummary(
        bundle=str(result.bundle.directory),
        target=manifest.target.name,
        model=manifest.model.id,
        recipe=manifest.quantization.recipe,
        reason=result.reason,
        bits_per_weight=manifest.quantization.bits_per_weight,
        codes_digest=manifest.quantization.codes_digest,
        bytes=sum(file.bytes for file in manifest.files.values()),
        context_length=manifest.context_length,
        dimensions=manifest.dimensions,
        prompts=tuple(manifest.prompts),
        quality=manifest.quality,
        seconds=result.seconds,
        peak_rss_bytes=result.peak_rss_bytes,
        device=result.device,
        peak_device_bytes=result.peak_device_bytes,
    )


def embedding_lines(summary: EmbeddingSummary) -> list[tuple[str, str]]:
    """Labels and values for a table."""
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
        ("export", cost_of(summary)),
        ("next", f"gemma-runtime verify {summary.bundle}"),
    ]


class Costs(Protocol):
    @property
    def seconds(self) -> float: ...
    @property
    def peak_rss_bytes(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def peak_device_bytes(self) -> int | None: ...


def cost_of(summary: Costs) -> str:
    """Time and peak memory of an export."""
    text = f"{summary.seconds:.1f} s, peak {format_bytes(summary.peak_rss_bytes)}"
    if summary.peak_device_bytes is None:
        return text
    return f"{text}, and {format_bytes(summary.peak_device_bytes)} of {summary.device}"
