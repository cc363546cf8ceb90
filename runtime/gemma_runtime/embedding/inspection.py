"""Describes bundles that give vectors from their manifests, and compares several."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from gemma_runtime.contents.inspection import (
    file_lines,
    origin_lines,
    read_codes_back,
    side_by_side,
    signature,
)
from gemma_runtime.embedding_bundle import EmbeddingBundle, EmbeddingManifest


@dataclass(frozen=True, slots=True)
class EmbeddingInspection:
    """A bundle's manifest, and what has to be computed from it or from the files."""

    bundle: str
    manifest: EmbeddingManifest
    codes_held: str | None  # codes digest computed from the artifact; None if not computed
    formats: dict[str, int]  # e.g. "int8-g32" -> tensors in it
    bytes: int  # of all files


@dataclass(frozen=True, slots=True)
class EmbeddingComparison:
    """Several bundles, and whether they hold the same things."""

    bundles: tuple[EmbeddingInspection, ...]
    same_model: bool  # the same checkpoint, by digest
    same_codes: bool  # the same quantized weights


def compare_embedding_bundles(bundles: Sequence[EmbeddingBundle]) -> EmbeddingComparison:
    """Inspect bundles, and compare their checkpoints and codes. Codes of several are read back.

    Raises BundleError for weights that are not those of the manifest.
    """
    found = tuple(_inspect(bundle, read_codes=len(bundles) > 1) for bundle in bundles)
    manifests = [one.manifest for one in found]
    return EmbeddingComparison(
        bundles=found,
        same_model=len({one.model.digest for one in manifests}) == 1,
        same_codes=len({one.quantization.codes_digest for one in manifests}) == 1,
    )


def render_embedding_comparison(comparison: EmbeddingComparison) -> Table:
    """A table with a column per bundle; a caption compares several."""
    names = [one.bundle for one in comparison.bundles]
    columns = [_lines(one) for one in comparison.bundles]
    return side_by_side(names, columns, comparison.same_model, comparison.same_codes)


def _inspect(bundle: EmbeddingBundle, *, read_codes: bool) -> EmbeddingInspection:
    return EmbeddingInspection(
        bundle=str(bundle.directory),
        manifest=bundle.manifest,
        codes_held=read_codes_back(bundle) if read_codes else None,
        formats=dict(Counter(bundle.manifest.quantization.tensors.values())),
        bytes=sum(file.bytes for file in bundle.manifest.files.values()),
    )


def _lines(inspection: EmbeddingInspection) -> dict[str, str]:
    manifest, quality = inspection.manifest, inspection.manifest.quality
    around = [*map(str, manifest.before), "text", *map(str, manifest.after)]
    return {
        **origin_lines(inspection),
        "quality": f"cosine {quality.mean_cosine:.5f}, least {quality.min_cosine:.5f}, to float32 "
        f"over {quality.texts} golden texts",
        "vectors": f"{manifest.dimensions} numbers",
        "context": f"{manifest.context_length} tokens: {' '.join(around)}",
        "tokenizer": "yes" if "tokenizer" in manifest.roles else "no: token ids only",
        "default prompt": manifest.default_prompt or "none",
        **{f"prompt {name}": repr(text) for name, text in manifest.prompts.items()},
        **{f"graph {name}": signature(graph) for name, graph in manifest.graphs.items()},
        **file_lines(inspection),
    }
