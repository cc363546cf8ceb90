"""The decoder's attention on ONNX Runtime, with KV caches, and its logits."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gemma_export.model.config import LayerSpec
from gemma_export.model.int8_cache import LayerScales
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.onnx.graph import MICROSOFT, Attribute, DataFile, GraphBuilder
from gemma_export.targets.onnx.ops import OnnxOps
from gemma_export.targets.onnx.positions import Positions
from gemma_runtime.manifest import Graph, LayerCache, TensorRole

_INT8_CACHE: Mapping[str, Attribute] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
_NO_BIASES = ("", "")  # inputs of GroupQueryAttention: attention_bias, head_sink


class DecoderOps(OnnxOps):
    def __init__(
        self,
        graph: GraphBuilder,
        io: Graph,
        caches: Sequence[LayerCache],
        context: int,
        epsilon: float,
        aside: Mapping[str, DataFile],
        scales: Sequence[LayerScales] | None,  # of int8 caches
    ) -> None:
        super().__init__(graph, io, context, epsilon, aside)
        self._caches = caches
        self._positions = Positions(graph, io)
        self._scales = scales

    def attend(self, q: str, k: str, v: str, layer: LayerSpec) -> str:
        attributes = _attention(layer)
        if is_windowed(self._caches[layer.index], self._context):
            attributes["sliding_window_cache"] = 1
        past, present = self._cache_names(layer.index)
        total = self._name(TensorRole.TOTAL)
        inputs = [q, k, v, *past, self._positions.last_of(total), total, *self._rope(layer)]
        inputs += self._cached_as(layer, attributes, position_ids="")
        outputs = [f"attended_{layer.index}", *present]
        return self._graph.node("GroupQueryAttention", inputs, attributes, MICROSOFT, outputs)[0]

    def attend_shared(self, q: str, layer: LayerSpec) -> str:
        """No new keys and values; what the source returns is the past.

        GroupQueryAttention has no sliding_window_cache for that, so it gets the ring as a cache
        that is filled from its start, and the true positions for rope alone.
        """
        cache, held = self._caches[layer.source], self._name(TensorRole.TOTAL)
        ring = cache if is_windowed(cache, self._context) else None
        if ring is not None:
            held = self._positions.held(ring)
        width = layer.kv_heads * layer.head_dim
        none = self._graph.constant(f"none_{width}", np.zeros((1, 0, width), np.float32))
        _, present = self._cache_names(layer.source)
        inputs = [q, none, none, *present, self._positions.last_of(held), held]
        attributes, outputs = _attention(layer), [f"attended_{layer.index}"]
        if self._scales is not None:
            outputs += [f"unused_key_{layer.index}", f"unused_value_{layer.index}"]
        inputs += self._rope(layer)
        inputs += self._cached_as(layer, attributes, self._positions.wanted())
        y = self._graph.node("GroupQueryAttention", inputs, attributes, MICROSOFT, outputs)[0]
        return self._positions.guarded(y, layer.source, ring)

    def wanted(self, x: str) -> str:
        return self._one("Gather", [x, self._name(TensorRole.WANTED)], {"axis": 1})

    def logits(self, x: str, head: StoredWeight, softcap: float | None) -> str:
        pieces = head.pieces()
        parts = self._split(x, [piece.shape[1] for piece in pieces])
        y, *others = [
            self._matmul(part, [piece]) for part, piece in zip(parts, pieces, strict=True)
        ]
        for other in others:
            y = self._one("Add", [y, other])
        if softcap is None:
            return y
        cap = self._graph.constant("final_softcap", np.array(softcap, np.float32))
        return self._one("Mul", [self._one("Tanh", [self._one("Div", [y, cap])]), cap])

    def _cache_names(self, index: int) -> tuple[list[str], list[str]]:
        """Names of a layer's past and present keys and values."""
        caches = [pair for pair in self._io.returned_caches() if pair[0].layer == index]
        past, present = ([spec.name for spec in specs] for specs in zip(*caches, strict=True))
        return past, present

    def _cached_as(
        self, layer: LayerSpec, attributes: dict[str, Attribute], position_ids: str
    ) -> list[str]:
        """The last inputs of GroupQueryAttention: positions, and the scales of an int8 cache.

        Adds the attributes of such a cache.
        """
        if self._scales is None:
            return [position_ids] if position_ids else []
        attributes |= _INT8_CACHE
        scales = self._scales[layer.index]
        return [position_ids, *_NO_BIASES, *self._cache_scales(layer.source, scales)]

    def _cache_scales(self, source: int, scales: LayerScales) -> Iterator[str]:
        """Names of the scales of keys and values, (1, K, 1, D)."""
        for part, values in (("keys", scales.keys), ("values", scales.values)):
            name = f"cache_scales.{source}.{part}"
            yield self._graph.constant(name, values[None, :, None].numpy())


def _attention(layer: LayerSpec) -> dict[str, Attribute]:
    return {
        "num_heads": layer.heads,
        "kv_num_heads": layer.kv_heads,
        "scale": layer.scale,
        "softcap": layer.softcap or 0.0,
        "do_rotary": 1,
        "local_window_size": layer.window if layer.window is not None else -1,
    }


def is_windowed(cache: LayerCache, context_length: int) -> bool:
    """Whether a layer's cache has fewer slots than the context, so that old tokens are dropped."""
    return cache.window is not None and cache.slots < context_length
