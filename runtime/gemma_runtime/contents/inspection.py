"""Describes bundles from their manifests, and compares several."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.table import Table
from rich.text import Text

from gemma_runtime.bundle import Bundle
from gemma_runtime.embedding_bundle import EmbeddingBundle, EmbeddingManifest
from gemma_runtime.errors import BundleError
from gemma_runtime.machine import format_bytes
from gemma_runtime.manifest import AttentionKind, Graph, Manifest, SamplingDefaults
from gemma_runtime.proof.worst_golden import BY_LANGUAGE, WorstGolden, worst_of_weights


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """All layers of one kind and size."""

    kind: AttentionKind
    layers: int
    window: int | None
    slots: int
    kv_heads: int
    head_dim: int
    bytes: int  # keys and values of all these layers
    source: int | None = None  # the layer whose cache all of them read


@dataclass(frozen=True, slots=True)
class Inspection:
    """A bundle's manifest, and what has to be computed from it or from the files."""

    bundle: str
    manifest: Manifest
    codes_held: str | None  # codes digest computed from the artifact; None if not computed
    formats: dict[str, int]  # e.g. "int4-g32" -> tensors in it
    caches: tuple[CacheFigures, ...]
    bytes: int  # of all files
    worst_golden: WorstGolden | None = None  # of the weights alone


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several bundles, and whether they hold the same things."""

    bundles: tuple[Inspection, ...]
    same_model: bool  # the same checkpoint, by digest
    same_codes: bool  # the same quantized weights, whatever the container


def inspect_bundle(bundle: Bundle, read_codes: bool = False) -> Inspection:
    """Read the manifest into what a person or a script would ask for; also the weights, if asked.

    Raises BundleError for weights that are not those of the manifest.
    """
    manifest = bundle.manifest
    return Inspection(
        bundle=str(bundle.directory),
        manifest=manifest,
        codes_held=read_codes_back(bundle) if read_codes else None,
        formats=dict(Counter(manifest.quantization.tensors.values())),
        caches=_caches(manifest),
        bytes=sum(file.bytes for file in manifest.files.values()),
        worst_golden=worst_of_weights(bundle),
    )


def compare_bundles(bundles: Sequence[Bundle], read_codes: bool | None = None) -> Comparison:
    """Inspect bundles and compare their checkpoints and codes.

    Codes are read back if `read_codes`, by default if there are several bundles.
    """
    is_read = len(bundles) > 1 if read_codes is None else read_codes
    found = tuple(inspect_bundle(bundle, read_codes=is_read) for bundle in bundles)
    manifests = [inspection.manifest for inspection in found]
    return Comparison(
        bundles=found,
        same_model=len({manifest.model.digest for manifest in manifests}) == 1,
        same_codes=len({manifest.quantization.codes_digest for manifest in manifests}) == 1,
    )


def read_codes_back(bundle: Bundle | EmbeddingBundle) -> str | None:
    """The artifact's codes digest. Raises BundleError if the manifest has another one."""
    from gemma_runtime.contents.held_codes import codes_digest  # readers of all containers

    held, claimed = codes_digest(bundle), bundle.manifest.quantization.codes_digest
    if held is not None and held != claimed:
        raise BundleError(
            f"{bundle.directory} has codes {held[:16]}, but its manifest says {claimed[:16]}; "
            "export it again"
        )
    return held


def render_comparison(comparison: Comparison) -> Table:
    """A table with a column per bundle; a caption compares several."""
    names = [one.bundle for one in comparison.bundles]
    columns = [_lines(one) for one in comparison.bundles]
    return side_by_side(names, columns, comparison.same_model, comparison.same_codes)


def side_by_side(
    names: Sequence[str],
    columns: Sequence[Mapping[str, str]],
    same_model: bool,
    same_codes: bool,
) -> Table:
    """A table of labels and values, with a column per bundle; a caption compares several."""
    table = Table(show_header=len(names) > 1, title_justify="left")
    table.add_column("bundle")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    labels = list(dict.fromkeys(label for column in columns for label in column))
    for label in labels:
        # Text, not str: rich would take a shape like [wanted] for markup and drop it.
        table.add_row(Text(label), *(Text(column.get(label, "–")) for column in columns))
    if len(names) > 1:
        table.caption = (
            f"{'the same checkpoint' if same_model else 'different checkpoints'}, "
            f"{'the same codes' if same_codes else 'different codes'}"
        )
        table.caption_justify = "left"
    return table


def _caches(manifest: Manifest) -> tuple[CacheFigures, ...]:
    """Group equal layers; their bytes come from the manifest's totals."""
    elements = {
        kind: sum(layer.elements for layer in manifest.layers if layer.kind is kind)
        for kind in AttentionKind
    }
    return tuple(
        CacheFigures(
            kind=layer.kind,
            layers=count,
            window=layer.window,
            slots=layer.slots,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            bytes=manifest.cache_bytes(layer.kind)
            * (count * layer.elements)
            // elements[layer.kind],
            source=layer.source,
        )
        for layer, count in Counter(manifest.layers).items()
    )


def _lines(inspection: Inspection) -> dict[str, str]:
    manifest, quality = inspection.manifest, inspection.manifest.quality
    return {
        **origin_lines(inspection),
        "quality": f"top-1 {quality.top1:.1%}, mean KL {quality.mean_kl:.4f}, p99 "
        f"{quality.p99_kl:.3f}, to float32 over {quality.positions} golden tokens"
        + _worst(inspection.worst_golden),
        "headroom": f"max |x| {manifest.headroom.max_abs:.4g}, folded factor "
        f"{manifest.headroom.factor:g}",
        "vocabulary": f"{manifest.vocab_size}; bos {manifest.bos_token}, stops at "
        f"{_join(map(str, manifest.stop_tokens))}",
        "sampling": _sampling(manifest.sampling),
        "context": f"{manifest.context_length} tokens, prefill in chunks of "
        f"{manifest.prefill_length}",
        "text": _text_parts(manifest),
        **_cache_lines(inspection),
        **{f"graph {n}": "\n".join(map(signature, parts)) for n, parts in manifest.graphs.items()},
        **file_lines(inspection),
    }


def _worst(golden: WorstGolden | None) -> str:
    return "" if golden is None else f"; {golden}; {BY_LANGUAGE}"


class Inspected(Protocol):
    """What is told of a bundle of any kind."""

    @property
    def bundle(self) -> str: ...
    @property
    def manifest(self) -> Manifest | EmbeddingManifest: ...
    @property
    def codes_held(self) -> str | None: ...
    @property
    def formats(self) -> dict[str, int]: ...
    @property
    def bytes(self) -> int: ...


def origin_lines(inspection: Inspected) -> dict[str, str]:
    """Where a bundle and its weights come from, by label."""
    manifest, held = inspection.manifest, inspection.codes_held
    model, target, quantization = manifest.model, manifest.target, manifest.quantization
    return {
        "folder": inspection.bundle,
        "model": f"{model.id}, {model.family}, {model.parameters / 1e6:.1f} M parameters",
        "revision": model.revision or "none",
        "model digest": model.digest[:16],
        "target": f"{target.name}: {target.label} {target.min_runtime_version} or newer",
        "weights": f"{quantization.recipe}, {quantization.bits_per_weight:.2f} bits per weight",
        "codes digest": quantization.codes_digest[:16],
        "codes read back": held[:16] if held else "no",
        "formats": _join(f"{count} {name}" for name, count in inspection.formats.items()),
    }


def file_lines(inspection: Inspected) -> dict[str, str]:
    """A bundle's files, and what wrote them, by label."""
    manifest = inspection.manifest
    return {
        **{name: format_bytes(file.bytes) for name, file in manifest.files.items()},
        "all files": format_bytes(inspection.bytes),
        "written by": _join(f"{name} {version}" for name, version in manifest.tools.items()),
    }


def _sampling(defaults: SamplingDefaults | None) -> str:
    if defaults is None:
        return "none given by the checkpoint"
    penalty = defaults.repetition_penalty
    ending = "" if penalty == 1 else f", repetition penalty {penalty:g}"
    if defaults.temperature == 0:
        return "greedy" + ending
    return (
        f"temperature {defaults.temperature:g}, top-k {defaults.top_k or 'all'}, "
        f"top-p {defaults.top_p:g}, min-p {defaults.min_p:g}{ending}"
    )


def _join(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _text_parts(manifest: Manifest) -> str:
    if "tokenizer" not in manifest.roles:
        return "no tokenizer: token ids only"
    template = "without" if manifest.chat_template is None else "with"
    return f"tokenizer, {template} a chat template of its own"


def _cache_lines(inspection: Inspection) -> dict[str, str]:
    """One label per kind of layers, with a line per cache size."""
    lines: dict[str, list[str]] = {}
    for cache in inspection.caches:
        found = lines.setdefault(f"cache, {cache.kind}", [])
        if cache.source is not None:
            found.append(f"{cache.layers} more layers read the cache of layer {cache.source}")
            continue
        window = "" if cache.window is None else f" for a window of {cache.window}"
        found.append(
            f"{cache.layers} layers, {cache.slots} slots{window}, {cache.kv_heads} heads of "
            f"{cache.head_dim}, {inspection.manifest.cache_dtype}: {format_bytes(cache.bytes)}"
        )
    return {label: "\n".join(found) for label, found in lines.items()} | _int8_lines(inspection)


def _int8_lines(inspection: Inspection) -> dict[str, str]:
    caches = inspection.manifest.int8_caches
    if caches is None:
        return {}
    text, quality = caches.calibration, caches.quality
    return {
        "cache scales": f"{caches.scales_digest[:16]}, measured on {text.tokens} tokens of text "
        f"{text.source}; top-1 {quality.top1:.1%}, mean KL {quality.mean_kl:.4f}, p99 "
        f"{quality.p99_kl:.3f}, to float32 caches"
    }


def signature(graph: Graph) -> str:
    """A graph's file, inputs and outputs, in one line."""
    held = {state.role for state in graph.states}  # some runtimes return every cache
    inputs, outputs = (
        _join(f"{t.name} {t.dtype}[{_join(map(str, t.shape))}]" for t in tensors)
        for tensors in (graph.inputs, [t for t in graph.outputs if t.role not in held])
    )
    return f"{graph.file}: {inputs} → {outputs}, {len(graph.states)} states"
