"""Inputs, outputs and states of Core ML and Core AI programs, as plain data.

T tokens of a call, S slots, D head size, M width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_export.formats.format import Format
from gemma_export.model.config import GemmaConfig
from gemma_runtime.manifest import AttentionKind, LayerCache, TensorRole, TensorSpec

Compute = Literal["gpu", "ane"]

# Rows after the last slot, for padded tokens. The Neural Engine prefers multiples of 32.
TRASH = 32
# Core ML silently moves a package above about 1 GB off the Neural Engine.
ANE_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive layers that form one package."""

    layers: range
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Layout:
    config: GemmaConfig
    caches: tuple[LayerCache, ...]
    compute: Compute
    external: bool  # the caller looks embeddings up
    parts: tuple[Part, ...]

    @property
    def trash(self) -> int:
        """Rows for padded tokens. The Neural Engine's masked write needs none."""
        return 0 if self.compute == "ane" else TRASH

    def inputs(self, part: Part, tokens: int) -> tuple[TensorSpec, ...]:
        """Inputs of a function, without states."""
        specs = [self._first_input(part, tokens)]
        if part.first and self.config.per_layer:
            shape = (tokens, len(self.config.kinds) * self.config.per_layer)
            role = TensorRole.PER_LAYER
            specs.append(TensorSpec(role.value, "float16", shape, role, None, None))
        if part.last:
            specs.append(TensorSpec("last", "int32", (1,), TensorRole.LAST, None, None))
        for kind in self.kinds(part):
            specs += self._kind_inputs(part, kind, tokens)
        return tuple(specs)

    def _first_input(self, part: Part, tokens: int) -> TensorSpec:
        if part.first and not self.external:
            return TensorSpec("tokens", "int32", (tokens,), TensorRole.TOKENS, None, None)
        role = TensorRole.EMBEDDINGS if part.first else TensorRole.HIDDEN
        shape = (tokens, self.config.hidden_size)
        return TensorSpec(role.value, "float16", shape, role, None, None)

    def _kind_inputs(self, part: Part, kind: AttentionKind, tokens: int) -> Iterator[TensorSpec]:
        slots = self._cache(kind).slots
        # The old ring followed by the chunk, or all slots of the context plus trash.
        seen = slots + (tokens if kind is AttentionKind.LOCAL else self.trash)
        half = self._cache(kind).head_dim // 2
        yield _of_kind(kind, TensorRole.COS, "float16", (tokens, half))
        yield _of_kind(kind, TensorRole.SIN, "float16", (tokens, half))
        yield _of_kind(kind, TensorRole.MASK, "float16", (tokens, seen))
        if not self._owners(part, kind):
            return
        if self.compute == "ane":
            yield _of_kind(kind, TensorRole.WRITE, "float16", (slots, tokens))
        else:
            yield _of_kind(kind, TensorRole.SLOTS, "int32", (tokens,))

    def outputs(self, part: Part, tokens: int) -> tuple[TensorSpec, ...]:
        if part.last:
            shape = (1, self.config.vocab_size)
            return (TensorSpec("logits", "float16", shape, TensorRole.LOGITS, None, None),)
        shape = (tokens, self.config.hidden_size)
        return (TensorSpec("hidden_out", "float16", shape, TensorRole.HIDDEN, None, None),)

    def states(self, part: Part) -> tuple[TensorSpec, ...]:
        """One state per attention kind, with the keys and values of all layers that own some."""
        return tuple(
            _of_kind(kind, TensorRole.CACHE, "float16", self._state_shape(part, kind))
            for kind in self.kinds(part)
            if self._owners(part, kind)
        )

    def _state_shape(self, part: Part, kind: AttentionKind) -> tuple[int, int, int]:
        cache = self._cache(kind)
        layers = len(self._owners(part, kind))
        return (2 * cache.kv_heads * layers, cache.slots + self.trash, cache.head_dim)

    def kinds(self, part: Part) -> tuple[AttentionKind, ...]:
        """The attention kinds of the part's layers."""
        return tuple(k for k in AttentionKind if any(self.caches[i].kind is k for i in part.layers))

    def first_row(self, layer: int) -> int:
        """The first row of a layer's keys in the state of its part."""
        part = next(part for part in self.parts if layer in part.layers)
        own = self.caches[layer]
        return 2 * own.kv_heads * self._owners(part, own.kind).index(layer)

    def _owners(self, part: Part, kind: AttentionKind) -> list[int]:
        """The part's layers of a kind that have caches of their own."""
        held = ((i, self.caches[i]) for i in part.layers)
        return [i for i, cache in held if cache.kind is kind and cache.source is None]

    def _cache(self, kind: AttentionKind) -> LayerCache:
        """The caches of all layers of a kind have one shape."""
        return next(cache for cache in self.caches if cache.kind is kind)


def _of_kind(
    kind: AttentionKind, role: TensorRole, dtype: str, shape: tuple[int, ...]
) -> TensorSpec:
    return TensorSpec(f"{kind.value}_{role.value}", dtype, shape, role, kind, None)


def make_layout(
    config: GemmaConfig,
    caches: Sequence[LayerCache],
    formats: Mapping[str, Format],
    compute: Compute,
    external: bool,
) -> Layout:
    limit = ANE_BYTES if compute == "ane" else None
    parts = _parts(config, formats, limit)
    return Layout(config, tuple(caches), compute, external, tuple(parts))


def _parts(config: GemmaConfig, formats: Mapping[str, Format], limit: int | None) -> Iterator[Part]:
    """Split layers into as few packages as the limit in bytes allows; the last has the head."""
    layers = len(config.kinds)
    sizes = [_layer_bytes(config, formats, index) for index in range(layers)]
    sizes[-1] += _bytes(config, formats, config.head)
    start, held = 0, 0
    for index, size in enumerate(sizes):
        if limit is not None and index > start and held + size > limit:
            yield Part(range(start, index), start == 0, last=False)
            start, held = index, 0
        held += size
    yield Part(range(start, layers), start == 0, last=True)


def _layer_bytes(config: GemmaConfig, formats: Mapping[str, Format], index: int) -> int:
    prefix = f"model.layers.{index}."
    return sum(_bytes(config, formats, name) for name in formats if name.startswith(prefix))


def _bytes(config: GemmaConfig, formats: Mapping[str, Format], name: str) -> int:
    rows, width = config.tensor_shapes()[name]
    fmt = formats[name]
    bits = 16 if fmt.is_float else fmt.bits_per_weight
    return int(rows * width * bits) // 8
