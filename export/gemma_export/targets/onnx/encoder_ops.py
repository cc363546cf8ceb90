"""An encoder's attention on ONNX Runtime, and the vector of a text.

There are no caches: a call gets a whole text. T tokens, K kv heads, G query heads of each, D head
size.
"""

import numpy as np

from gemma_export.model.config import LayerSpec
from gemma_export.targets.onnx.graph import MICROSOFT
from gemma_export.targets.onnx.ops import OnnxOps
from gemma_runtime.manifest import TensorRole

_LEAST_LENGTH = 1e-12  # a vector is divided by at least this, as torch's `normalize` does


class OnnxEncoderOps(OnnxOps):
    def attend(self, q: str, k: str, v: str, layer: LayerSpec) -> str:
        q, k = self._rotated(q, layer, layer.heads), self._rotated(k, layer, layer.kv_heads)
        q = self._one("Transpose", [self._heads(q, layer, layer.heads)], {"perm": [1, 2, 0, 3]})
        k = self._one("Transpose", [self._heads(k, layer, layer.kv_heads)], {"perm": [1, 2, 3, 0]})
        v = self._one("Transpose", [self._heads(v, layer, layer.kv_heads)], {"perm": [1, 2, 0, 3]})
        # (K, G, T, D) · (K, 1, D, T): query heads that share a key are a batch of their own
        scores = self._one("FusedMatMul", [q, k], {"alpha": layer.scale}, MICROSOFT)
        if layer.window is not None:
            scores = self._one("Add", [scores, self._beyond(layer.window)])
        weights = self._one("Softmax", [scores], {"axis": -1})  # (K, G, T, T)
        y = self._one("MatMul", [weights, v])  # (K, G, T, D)
        y = self._one("Transpose", [y], {"perm": [2, 0, 1, 3]})
        width = layer.heads * layer.head_dim
        shape = self._graph.constant(f"row_of_{width}", np.array([1, -1, width]))
        return self._one("Reshape", [y, shape])  # (1, T, H · D)

    def attend_shared(self, q: str, layer: LayerSpec) -> str:
        raise AssertionError(layer)  # no encoder shares caches: it has none

    def wanted(self, x: str) -> str:
        return x

    def mean(self, x: str) -> str:
        axes = self._graph.constant("tokens_axis", np.array([1]))
        return self._one("ReduceMean", [x, axes], {"keepdims": 0})

    def unit(self, x: str) -> str:
        axes = self._graph.constant("last_axis", np.array([-1]))
        length = self._one("ReduceL2", [x, axes], {"keepdims": 1})
        least = self._graph.constant("least_length", np.array(_LEAST_LENGTH, np.float32))
        return self._one("Div", [x, self._one("Max", [length, least])])

    def _heads(self, x: str, layer: LayerSpec, heads: int) -> str:
        """(1, T, heads · D) → (T, K, heads / K, D)."""
        sizes = [-1, layer.kv_heads, heads // layer.kv_heads, layer.head_dim]
        name = "heads_" + "_".join(map(str, sizes[1:]))
        return self._one("Reshape", [x, self._graph.constant(name, np.array(sizes))])

    def _rotated(self, x: str, layer: LayerSpec, heads: int) -> str:
        inputs = [x, self._positions(), *self._rope(layer)]
        return self._one("RotaryEmbedding", inputs, {"num_heads": heads}, MICROSOFT)

    def _positions(self) -> str:
        """0 to T - 1, (1, T)."""

        def make() -> str:
            ends = [self._int(0), self._count(), self._int(1)]
            row = self._graph.constant("row", np.array([1, -1]))
            return self._one("Reshape", [self._one("Range", ends), row])

        return self._graph.once("positions", make)

    def _beyond(self, window: int) -> str:
        """-inf where a key is `window` tokens or more away from the query, else 0: (T, T)."""

        def make() -> str:
            column = self._graph.constant("column", np.array([-1, 1]))
            row = self._positions()
            distance = self._one("Sub", [self._one("Reshape", [row, column]), row])
            is_far = self._one("GreaterOrEqual", [self._one("Abs", [distance]), self._int(window)])
            values = [np.array(value, np.float32) for value in (-np.inf, 0)]
            names = [self._graph.constant(f"mask_{value}", value) for value in values]
            return self._one("Where", [is_far, *names])

        return self._graph.once(f"beyond {window}", make)

    def _count(self) -> str:
        """T, without a dimension."""

        def make() -> str:
            shape = self._one("Shape", [self._name(TensorRole.TOKENS)], {"start": 1, "end": 2})
            return self._one("Squeeze", [shape])

        return self._graph.once("count", make)

    def _int(self, value: int) -> str:
        return self._graph.constant(f"int64_{value}", np.array(value, np.int64))
