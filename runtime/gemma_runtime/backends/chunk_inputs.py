"""Inputs that the host computes for one chunk: cosines, masks and slots.

Core ML and Core AI graphs compute no index themselves. An input's role and shape determine its
value. T tokens per call, of which the last may be padding; S slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.backends.embedding_table import EmbeddingTable
from gemma_runtime.backends.rope import rope_angles
from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import (
    AttentionKind,
    Graph,
    LayerCache,
    Manifest,
    TensorRole,
    TensorSpec,
)

Array = NDArray[np.generic]

# Far below any score but finite in float16: not every Apple compute unit handles -inf.
_HIDDEN = -4e4


@dataclass(frozen=True, slots=True)
class ChunkInputs:
    """One chunk of tokens at a position."""

    manifest: Manifest
    tables: Mapping[TensorRole, EmbeddingTable]  # whose rows the graph takes as inputs
    tokens: Sequence[int]
    position: int

    def of(self, graph: Graph) -> dict[str, Array]:
        """Values of all inputs except hidden states, which come from another part."""
        given = [spec for spec in graph.inputs if spec.role is not TensorRole.HIDDEN]
        return {spec.name: self._input(spec).astype(spec.dtype, copy=False) for spec in given}

    def _input(self, spec: TensorSpec) -> Array:
        length = int(spec.shape[0])
        match spec.role:
            case TensorRole.TOKENS:
                return _padded(self.tokens, length)
            case TensorRole.LAST:
                return np.array([len(self.tokens) - 1])
            case TensorRole.EMBEDDINGS | TensorRole.PER_LAYER:
                return self.tables[spec.role].rows(_padded(self.tokens, length).tolist())
        return self._of_kind(spec, self._cache(spec))

    def _of_kind(self, spec: TensorSpec, cache: LayerCache) -> Array:
        rows, columns = int(spec.shape[0]), int(spec.shape[-1])
        match spec.role:
            case TensorRole.SLOTS:
                return self._slots(cache, rows)
            case TensorRole.WRITE:
                return self._onehot(cache, rows, columns)
            case TensorRole.MASK:
                return self._mask(cache, rows, columns)
            case TensorRole.COS:
                return np.cos(self._angles(cache, rows)).astype(np.float16)
            case TensorRole.SIN:
                return np.sin(self._angles(cache, rows)).astype(np.float16)
        raise BundleError(
            f"this runtime can't compute an input with role {spec.role}; update gemma-export"
        )

    def _cache(self, spec: TensorSpec) -> LayerCache:
        """The cache layout of the layers that use an input."""
        for cache in self.manifest.layers:
            if cache.kind is spec.kind:
                return cache
        raise BundleError(f"manifest.json: no layer uses input {spec.name}; export again")

    def _angles(self, cache: LayerCache, length: int) -> NDArray[np.float64]:
        positions = self.position + np.arange(length)
        return rope_angles(self.manifest.ropes[cache.kind], positions, cache.head_dim)

    def _onehot(self, cache: LayerCache, slots: int, length: int) -> NDArray[np.float16]:
        """(slots, tokens): 1 where the token is written; a padding token's column is 0."""
        onehot: NDArray[np.bool_] = np.arange(slots)[:, None] == self._slots(cache, length)
        return onehot.astype(np.float16)

    def _slots(self, cache: LayerCache, length: int) -> NDArray[np.int64]:
        """The slot of each token; padding goes to the row after the last slot."""
        places = (self.position + np.arange(length)) % cache.slots
        return np.where(np.arange(length) < len(self.tokens), places, cache.slots)

    def _mask(self, cache: LayerCache, length: int, columns: int) -> NDArray[np.float16]:
        """The attention mask: over the context, or over the old ring followed by the chunk."""
        position, count = self.position, len(self.tokens)
        query = position + np.arange(length)[:, None]  # (T, 1)
        if cache.kind is AttentionKind.LOCAL:
            held = position - 1 - np.mod(position - 1 - np.arange(cache.slots), cache.slots)
            chunk = np.where(np.arange(length) < count, position + np.arange(length), -1)
            held = np.concatenate([held, chunk])
        else:
            held = np.where(np.arange(columns) < position + count, np.arange(columns), -1)
        seen = (held >= 0) & (held <= query)
        if cache.window is not None:
            seen &= held > query - cache.window
        return np.where(seen, 0.0, _HIDDEN).astype(np.float16)


def _padded(values: Sequence[int], length: int) -> NDArray[np.int64]:
    return np.pad(np.array(values), (0, length - len(values)))
