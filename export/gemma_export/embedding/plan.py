"""Computes sizes and memory of an encoder's bundle without reading weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_export.device import HOST
from gemma_export.formats.format import Format
from gemma_export.model.config import TABLE, GemmaConfig
from gemma_export.plan import (
    FLOAT_BYTES,
    TOKENIZER_PARSING,
    ArtifactBytes,
    Parameters,
    PhoneVerdict,
    blocks_bytes,
    count_parameters,
    held_bytes,
    judge_phones,
    measure_artifact,
    widest_row,
)
from gemma_export.quantize.recipe import Recipe, bits_per_weight
from gemma_export.targets import target_spec

# Copies of all heads' scores in onnxruntime's arena: 8.6 and 7.6 for 2,048 tokens of the two
# official shapes, onnxruntime 1.32.
_SCORE_COPIES = 9
_WIDEST_COPIES = 3  # copies of the widest activations while the reference runs


@dataclass(frozen=True, slots=True)
class EmbeddingRunBytes:
    """Resident memory of an embedder, in bytes. The table stays in its file."""

    mapped: int  # norms and ropes
    prepacked: int  # matrices in the kernels' layout
    activations: int  # for the longest text
    runtime: int
    total: int


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    target: str
    recipe: str
    family: str
    context_length: int
    dimensions: int
    parameters: Parameters
    bits_per_weight: float  # including float16 scales and zero points
    artifact: ArtifactBytes
    run: EmbeddingRunBytes
    export_peak_bytes: int
    phones: tuple[PhoneVerdict, ...]
    reason: str | None  # why this recipe; None if the user chose it


def plan_encoder(
    config: GemmaConfig, recipe: Recipe, context: int, target: str, reason: str | None
) -> EmbeddingPlan:
    """Compute the plan from the shapes alone."""
    formats, costs = recipe.formats(config), target_spec(target).costs
    artifact = measure_artifact(config, formats, context, costs)
    run = _run(config, formats, context, artifact, costs.runtime, costs.packed)
    return EmbeddingPlan(
        target=target,
        recipe=recipe.name,
        family=config.family,
        context_length=context,
        dimensions=config.dimensions,
        parameters=count_parameters(config),
        bits_per_weight=bits_per_weight(config, formats),
        artifact=artifact,
        run=run,
        export_peak_bytes=_export_peak(config, costs.exporting, context),
        phones=judge_phones(run.total),
        reason=reason,
    )


def _run(
    config: GemmaConfig,
    formats: Mapping[str, Format],
    context: int,
    artifact: ArtifactBytes,
    runtime: int,
    packed: float,
) -> EmbeddingRunBytes:
    mapped = artifact.norms + artifact.ropes
    prepacked = sum(
        round(held_bytes(config, name, fmt) * (1.0 if fmt.is_float else packed))
        for name, fmt in formats.items()
        if name != TABLE
    )
    alive = context * widest_row(config) + _SCORE_COPIES * config.heads * context**2
    activations = alive * FLOAT_BYTES
    total = runtime + mapped + prepacked + activations
    return EmbeddingRunBytes(mapped, prepacked, activations, runtime, total)


def _export_peak(config: GemmaConfig, exporting: int, context: int) -> int:
    """Peak of parsing the tokenizer, or of the reference with its longest golden."""
    tokens = min(context, 2 * config.sliding_window)
    widest = _WIDEST_COPIES * (tokens * widest_row(config) + config.heads * tokens**2) * FLOAT_BYTES
    working = blocks_bytes(HOST) + widest
    return exporting + max(config.vocab_size * TOKENIZER_PARSING, working)
