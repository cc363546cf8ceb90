"""What attention needs to know of where tokens are. Each value is computed once per call.

T new tokens, of which N get logits.
"""

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from gemma_export.targets.onnx.graph import GraphBuilder
from gemma_runtime.manifest import Graph, LayerCache, TensorRole


class Positions:
    """Adds nodes that compute positions and lengths from the graph's inputs."""

    def __init__(self, graph: GraphBuilder, io: Graph) -> None:
        self._graph, self._one = graph, graph.one
        self._total, self._tokens, self._wanted = (
            io.tensor(role).name
            for role in (TensorRole.TOTAL, TensorRole.TOKENS, TensorRole.WANTED)
        )

    def last_of(self, total: str) -> str:
        """GroupQueryAttention's seqlens_k: the index of the last of `total` tokens, (1,)."""

        def make() -> str:
            last = self._one("Sub", [total, self._int(1)])
            return self._one("Reshape", [last, self._graph.constant("batch", np.array([1]))])

        return self._graph.once(f"last of {total}", make)

    def held(self, ring: LayerCache) -> str:
        """The number of tokens that a ring holds after this call.

        A full ring drops `ring_step` tokens at once: see `gemma_runtime.backends.ort`.
        """

        def make() -> str:
            over = self._one("Add", [self._total, self._int(ring.ring_step - 1 - ring.slots)])
            step = self._int(ring.ring_step)
            drops = self._one("Max", [self._one("Div", [over, step]), self._int(0)])
            return self._one("Sub", [self._total, self._one("Mul", [drops, step])])

        return self._graph.once(f"rows of {ring.slots}", make)

    def wanted(self) -> str:
        """Positions of the tokens that get logits, (1, N)."""

        def make() -> str:
            total = self._one("Cast", [self._total], {"to": TensorProto.INT64})
            new = self._one("Shape", [self._tokens], {"start": 1, "end": 2})
            wanted = self._one("Add", [self._one("Sub", [total, new]), self._wanted])
            return self._one("Reshape", [wanted, self._graph.constant("row", np.array([1, -1]))])

        return self._graph.once("positions", make)

    def guarded(self, y: str, source: int, ring: LayerCache | None) -> str:
        """The attention y of a layer that shares the cache of `source`.

        NaN if the wanted positions are not the last N, as GroupQueryAttention takes them to be, or
        if the ring has dropped what the first of them attends to. `OrtSession` asks for neither;
        another program must not mistake the result. One layer per source is enough.
        """
        name = f"guard of {source}"
        if self._graph.has_made(name):
            return y
        return self._one("Mul", [y, self._graph.once(name, self._guard(ring))])

    def _guard(self, ring: LayerCache | None) -> Callable[[], str]:
        def make() -> str:
            count = self._one(
                "Cast", [self._one("Shape", [self._wanted])], {"to": TensorProto.INT32}
            )
            first = self._one("Gather", [self.wanted(), self._int(0)], {"axis": 1})
            first = self._one("Cast", [first], {"to": TensorProto.INT32})
            is_right = self._one("Equal", [self._one("Add", [first, count]), self._total])
            if ring is not None:
                least = self._one("Add", [count, self._int((ring.window or 0) - 1)])
                is_held = self._one("GreaterOrEqual", [self.held(ring), least])
                is_whole = self._one("Equal", [self.held(ring), self._total])
                is_right = self._one("And", [is_right, self._one("Or", [is_whole, is_held])])
            one, nan = (np.array(x, np.float32) for x in (1, np.nan))
            values = [self._graph.constant("valid", one), self._graph.constant("invalid", nan)]
            return self._one("Where", [is_right, *values])

        return make

    def _int(self, value: int) -> str:
        return self._graph.constant(f"int_{value}", np.array(value, np.int32))
