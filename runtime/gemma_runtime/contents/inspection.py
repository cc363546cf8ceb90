"""What a bundle is, from its manifest; and in what several of them are alike."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import BundleError
from gemma_runtime.machine import format_bytes
from gemma_runtime.manifest import (
    Agreement,
    AttentionKind,
    Graph,
    Headroom,
    Manifest,
    Model,
    Target,
    TensorSpec,
)


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


@dataclass(frozen=True, slots=True)
class Inspection:
    bundle: str
    schema_version: int
    model: Model
    target: Target
    recipe: str
    bits_per_weight: float
    codes_digest: str  # as the manifest has it
    codes_held: str | None  # the same, computed from the artifact; None where it was not
    formats: dict[str, int]  # e.g. "int4-g32" -> tensors in it
    vocab_size: int
    context_length: int
    prefill_length: int
    bos_token: int
    stop_tokens: tuple[int, ...]
    has_tokenizer: bool
    has_chat_template: bool
    caches: tuple[CacheFigures, ...]
    cache_dtype: str
    graphs: dict[str, tuple[Graph, ...]]  # the parts of each
    headroom: Headroom
    quality: Agreement
    files: dict[str, int]  # path -> bytes
    bytes: int  # of all files
    tools: dict[str, str]


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
    sizes = {name: file.bytes for name, file in manifest.files.items()}
    return Inspection(
        bundle=str(bundle.directory),
        schema_version=manifest.schema_version,
        model=manifest.model,
        target=manifest.target,
        recipe=manifest.quantization.recipe,
        bits_per_weight=manifest.quantization.bits_per_weight,
        codes_digest=manifest.quantization.codes_digest,
        codes_held=_held_codes(bundle) if read_codes else None,
        formats=dict(Counter(manifest.quantization.tensors.values())),
        vocab_size=manifest.vocab_size,
        context_length=manifest.context_length,
        prefill_length=manifest.prefill_length,
        bos_token=manifest.bos_token,
        stop_tokens=manifest.stop_tokens,
        has_tokenizer="tokenizer" in manifest.roles,
        has_chat_template=manifest.chat_template is not None,
        caches=_caches(manifest),
        cache_dtype=manifest.cache_dtype,
        graphs=manifest.graphs,
        headroom=manifest.headroom,
        quality=manifest.quality,
        files=sizes,
        bytes=sum(sizes.values()),
        tools=manifest.tools,
    )


def compare_bundles(bundles: Sequence[Bundle]) -> Comparison:
    """Inspect several bundles and say in what they are alike, by the weights that they hold."""
    found = tuple(inspect_bundle(bundle, read_codes=len(bundles) > 1) for bundle in bundles)
    return Comparison(
        bundles=found,
        same_model=len({inspection.model.digest for inspection in found}) == 1,
        same_codes=len({inspection.codes_digest for inspection in found}) == 1,
    )


def _held_codes(bundle: Bundle) -> str | None:
    """The digest of what the artifact holds. Raises BundleError if the manifest says another."""
    from gemma_runtime.contents.held_codes import codes_digest  # readers of all containers

    held, claimed = codes_digest(bundle), bundle.manifest.quantization.codes_digest
    if held is not None and held != claimed:
        raise BundleError(
            f"{bundle.directory} holds codes {held[:16]}, its manifest says {claimed[:16]}; "
            "export it again"
        )
    return held


def render_comparison(comparison: Comparison) -> Table:
    """A column per bundle; with several, the last lines say what is the same."""
    table = Table(show_header=len(comparison.bundles) > 1, title_justify="left")
    table.add_column("bundle")
    for inspection in comparison.bundles:
        table.add_column(Text(inspection.bundle), overflow="fold")
    columns = [_lines(inspection) for inspection in comparison.bundles]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    for label in labels:
        # Text, not str: rich would take the shape [wanted] for markup, and swallow it.
        table.add_row(Text(label), *(Text(column.get(label, "–")) for column in columns))
    if len(comparison.bundles) > 1:
        table.caption = (
            f"{'the same checkpoint' if comparison.same_model else 'different checkpoints'}, "
            f"{'the same codes' if comparison.same_codes else 'different codes'}"
        )
        table.caption_justify = "left"
    return table


def _caches(manifest: Manifest) -> tuple[CacheFigures, ...]:
    """Layers that are alike, together; widths come from the manifest's own count."""
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
        )
        for layer, count in Counter(manifest.layers).items()
    )


def _lines(inspection: Inspection) -> dict[str, str]:
    model, quality = inspection.model, inspection.quality
    return {
        "folder": inspection.bundle,
        "model": f"{model.id}, {model.family}, {model.parameters / 1e6:.1f} M parameters",
        "revision": model.revision or "none",
        "model digest": model.digest[:16],
        "target": f"{inspection.target.name}: {inspection.target.label} "
        f"{inspection.target.min_runtime_version} or newer",
        "weights": f"{inspection.recipe}, {inspection.bits_per_weight:.2f} bits per weight",
        "codes digest": inspection.codes_digest[:16],
        "codes read back": inspection.codes_held[:16] if inspection.codes_held else "no",
        "formats": _join(f"{count} {name}" for name, count in inspection.formats.items()),
        "quality": f"top-1 {quality.top1:.1%}, mean KL {quality.mean_kl:.4f}, p99 "
        f"{quality.p99_kl:.3f}, to float32 over {quality.positions} golden tokens",
        "headroom": f"max |x| {inspection.headroom.max_abs:.4g}, folded factor "
        f"{inspection.headroom.factor:g}",
        "vocabulary": f"{inspection.vocab_size}; bos {inspection.bos_token}, stops at "
        f"{_join(map(str, inspection.stop_tokens))}",
        "context": f"{inspection.context_length} tokens, prefill in chunks of "
        f"{inspection.prefill_length}",
        "text": _text(inspection),
        **_cache_lines(inspection),
        **{f"graph {n}": "\n".join(map(_graph, parts)) for n, parts in inspection.graphs.items()},
        **{name: format_bytes(size) for name, size in inspection.files.items()},
        "all files": format_bytes(inspection.bytes),
        "written by": _join(f"{name} {version}" for name, version in inspection.tools.items()),
    }


def _join(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _text(inspection: Inspection) -> str:
    if not inspection.has_tokenizer:
        return "no tokenizer: token ids only"
    template = "with" if inspection.has_chat_template else "without"
    return f"tokenizer, {template} a chat template of its own"


def _cache_lines(inspection: Inspection) -> dict[str, str]:
    """A label per kind; layers of one kind that differ in size share it, a line each."""
    lines: dict[str, list[str]] = {}
    for cache in inspection.caches:
        lines.setdefault(f"cache, {cache.kind}", []).append(_cache(cache, inspection))
    return {label: "\n".join(found) for label, found in lines.items()}


def _cache(cache: CacheFigures, inspection: Inspection) -> str:
    window = "" if cache.window is None else f" for a window of {cache.window}"
    return (
        f"{cache.layers} layers, {cache.slots} slots{window}, {cache.kv_heads} heads of "
        f"{cache.head_dim}, {inspection.cache_dtype}: {format_bytes(cache.bytes)}"
    )


def _graph(graph: Graph) -> str:
    inputs = _join(_tensor(tensor) for tensor in graph.inputs)
    held = {state.role for state in graph.states}  # some runtimes give every cache back
    outputs = _join(_tensor(tensor) for tensor in graph.outputs if tensor.role not in held)
    return f"{graph.file}: {inputs} → {outputs}, {len(graph.states)} states"


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype}[{_join(map(str, tensor.shape))}]"
