"""The decoder's operations as XNNPACK delegates, and the steps between them.

A delegate cannot write a cache, look up a token or pick the last token. Each such step ends one
delegate and begins the next. A value that one delegate computes and another uses becomes an output
of the first and an input of the second automatically.

Shapes: T new tokens, M width, H query heads, K kv heads, G = H / K, D head size, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn

from gemma_export.model.config import LayerSpec
from gemma_export.model.ops import lookup_scale
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.executorch.named_data import NamedData
from gemma_export.targets.executorch.xnn_graph import Value, XnnGraph
from gemma_runtime.manifest import LayerCache


@dataclass(frozen=True, slots=True)
class Delegate:
    """Runs `graph` on the tensors named in `inputs`; the results get the names in `outputs`."""

    graph: XnnGraph
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Embed:
    """The new tokens' rows of the table: (T, M)."""

    table: StoredWeight
    output: str


@dataclass(frozen=True, slots=True)
class Write:
    """New keys and values, (K, T, D) each, into the slots of a layer's caches."""

    layer: int
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Last:
    """The last token's row of (T, …): (1, …)."""

    input: str
    output: str


# Prefixes of the names of ropes and masks: for which of the new tokens they are.
ALL, LAST = "", "last "

Step: TypeAlias = Delegate | Embed | Write | Last


@dataclass(frozen=True, slots=True)
class Handle:
    """A value of the decoder: the graph that computes it, and its name between delegates."""

    name: str
    shape: tuple[int, ...]  # with one token
    home: XnnGraph | None  # None: computed between delegates
    value: Value = 0
    whole: "Handle | None" = None  # of which it is some columns, cut out where they are used
    start: int = 0  # the first of them


class XnnOps:
    """Implements `Ops`; calling it appends to `steps`, from the tokens to the logits."""

    def __init__(self, data: NamedData, caches: Sequence[LayerCache], epsilon: float) -> None:
        self.steps: list[Step] = []
        self._data = data
        self._caches = caches
        self._epsilon = epsilon
        self._count = 0
        self._begin()

    def embed(self, table: StoredWeight, scale: float) -> Handle:
        self._data.add_weight(table)
        rows = self._between((1, table.shape[1]))
        self.steps.insert(-1, Embed(table, rows.name))
        x = self._use(rows)
        if table.format.bits == 4:
            x = self._swap_pairs(x)
        multiplier = lookup_scale(table, scale)
        if not isinstance(multiplier, float):
            row = self._graph.constant(f"{table.name} multiplier", multiplier.numpy())
            return self._made(self._times(x, row))
        return self._made(self._times(x, self._graph.scalar(multiplier)))

    def norm(self, x: Handle, gain: StoredWeight) -> Handle:
        return self._made(self._norm(self._use(x), gain))

    def head_norm(self, x: Handle, gain: StoredWeight, heads: int) -> Handle:
        return self._made(self._head_norm(x, gain, heads))

    def project(self, x: Handle, weights: Sequence[StoredWeight]) -> list[Handle]:
        return [self._made(y) for y in self._project(self._use(x), weights)]

    def value_norm(self, v: Handle, layer: LayerSpec) -> Handle:
        return self._made(self._head_norm(v, None, layer.kv_heads))

    def attend(self, q: Handle, k: Handle, v: Handle, layer: LayerSpec) -> Handle:
        query = self._made(self._query(q, layer, ALL))
        key = self._rotate(self._heads(k, layer.kv_heads), layer, ALL)
        value = self._heads(v, layer.kv_heads)
        names = [self._leave(self._made(y)) for y in (key, value)]
        self._cut(Write(layer.index, *names))
        return self._made(self._attend(self._use(query), layer, ALL))

    def attend_shared(self, q: Handle, layer: LayerSpec) -> Handle:
        """For the last token only: `wanted` was called behind the last cache."""
        return self._made(self._attend(self._query(q, layer, LAST), layer, LAST))

    def add_norm(
        self, x: Handle, branch: Handle, post: StoredWeight | None, then: StoredWeight
    ) -> tuple[Handle, Handle]:
        added = self._use(branch)
        if post is not None:
            added = self._norm(added, post)
        total = self._graph.binary(xnn.XNNAdd, self._use(x), added)
        return self._made(total), self._made(self._norm(total, then))

    def scaled_add_norm(
        self,
        x: Handle,
        branch: Handle,
        post: StoredWeight,
        factor: StoredWeight,
        then: StoredWeight,
    ) -> tuple[Handle, Handle]:
        graph = self._graph
        total = graph.binary(xnn.XNNAdd, self._use(x), self._norm(self._use(branch), post))
        total = self._times(total, graph.constant(factor.name, factor.rows(0, 1).numpy()))
        return self._made(total), self._made(self._norm(total, then))

    def add(self, a: Handle, b: Handle) -> Handle:
        return self._made(self._graph.binary(xnn.XNNAdd, self._use(a), self._use(b)))

    def scaled(self, x: Handle, factor: float) -> Handle:
        return self._made(self._times(self._use(x), self._graph.scalar(factor)))

    def columns(self, x: Handle, part: int, parts: int) -> Handle:
        """Cut out where it is used: the current delegate may have other tokens than that one."""
        width = x.shape[-1] // parts
        return Handle(self._name(), (1, width), None, whole=x, start=part * width)

    def geglu(self, gate: Handle, up: Handle) -> Handle:
        """gelu(gate) · up. XNNPACK's own gelu is the erf form, so this builds the tanh form:

        gelu(g) = g · sigmoid(2 √(2/π) · (g + 0.044715 g³)).
        """
        graph, g = self._graph, self._use(gate)
        slope = 2 * np.sqrt(2 / np.pi)
        inner = self._times(graph.unary(xnn.XNNSquare, g), graph.scalar(0.044715 * slope))
        inner = self._times(graph.binary(xnn.XNNAdd, inner, graph.scalar(slope)), g)
        gelu = self._times(g, graph.unary(xnn.XNNSigmoid, inner))
        return self._made(self._times(gelu, self._use(up)))

    def wanted(self, x: Handle) -> Handle:
        last = self._between(x.shape)
        step = Last(self._leave(x), last.name)
        if x.home is self._graph:
            self._cut(step)
        else:
            self.steps.insert(-1, step)
        return last

    def logits(self, x: Handle, head: StoredWeight, softcap: float | None) -> Handle:
        (y,) = self._project(self._use(x), [head])
        logits = self._made(y if softcap is None else self._softcap(y, softcap))
        self._leave(logits)
        return logits

    # Values and delegates

    def _begin(self) -> None:
        self._graph = XnnGraph(self._data)
        self._delegate = Delegate(self._graph)
        self._entered: dict[str, Value] = {}
        self.steps.append(self._delegate)

    def _cut(self, step: Step) -> None:
        """End the current delegate, append a step, and begin the next delegate."""
        if self._graph.is_empty:
            self.steps.insert(-1, step)
            return
        self.steps.append(step)
        self._begin()

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _between(self, shape: Sequence[int]) -> Handle:
        return Handle(self._name(), tuple(shape), None)

    def _made(self, value: Value) -> Handle:
        return Handle(self._name(), self._graph.shape(value), self._graph, value)

    def _use(self, handle: Handle) -> Value:
        """The handle's value in the current delegate; an input of it if computed elsewhere."""
        if handle.whole is not None:
            return self._graph.slice(self._use(handle.whole), handle.start, handle.shape[-1])
        if handle.home is self._graph:
            return handle.value
        return self._enter(self._leave(handle), handle.shape)

    def _enter(self, name: str, shape: Sequence[int]) -> Value:
        if name not in self._entered:
            self._entered[name] = self._graph.input(shape)
            self._delegate.inputs.append(name)
        return self._entered[name]

    def _leave(self, handle: Handle) -> str:
        """Make a value an output of the delegate that computes it; return its name."""
        for step in self.steps:
            if not isinstance(step, Delegate) or step.graph is not handle.home:
                continue
            if handle.name not in step.outputs:
                step.graph.output(handle.value)
                step.outputs.append(handle.name)
        return handle.name

    # Arithmetic within one delegate

    def _times(self, a: Value, b: Value) -> Value:
        return self._graph.binary(xnn.XNNMultiply, a, b)

    def _norm(self, x: Value, gain: StoredWeight | None) -> Value:
        """RMSNorm. The mean is a product with a row of 1 / D, which has a fast kernel."""
        graph, width = self._graph, self._graph.shape(x)[-1]
        row = graph.constant(f"mean of {width}", np.full((1, width), 1 / width, np.float32))
        mean = graph.linear(graph.unary(xnn.XNNSquare, x), row)  # (…, 1)
        inner = graph.binary(xnn.XNNAdd, mean, graph.scalar(self._epsilon))
        scaled = self._times(x, graph.unary(xnn.XNNReciprocalSquareRoot, inner))
        if gain is None:
            return scaled
        return self._times(scaled, graph.constant(gain.name, 1 + gain.rows(0, width).numpy()))

    def _head_norm(self, x: Handle, gain: StoredWeight | None, heads: int) -> Value:
        width = x.shape[-1]
        split = self._graph.reshape(self._use(x), (-1, heads, width // heads))
        return self._graph.reshape(self._norm(split, gain), (-1, width))

    def _project(self, x: Value, weights: Sequence[StoredWeight]) -> list[Value]:
        graph = self._graph
        quantized = None
        values = []
        for weight in weights:
            if weight.format.is_float:
                values.append(graph.linear(x, self._weight(weight)))
                continue
            quantized = graph.quantize(x) if quantized is None else quantized
            values.append(graph.linear(quantized, self._weight(weight)))
        return values

    def _weight(self, weight: StoredWeight) -> Value:
        self._data.add_weight(weight)
        rows, width = weight.shape
        if weight.format.is_float:
            return self._graph.weight(weight.name, (rows, width))
        if weight.format.bits == 8:
            return self._graph.channelwise(weight.name, (rows, width))
        return self._graph.blockwise(weight.name, (rows, width), weight.format.group)

    def _heads(self, x: Handle, heads: int) -> Value:
        """(T, heads · D) → (heads, T, D)."""
        split = self._graph.reshape(self._use(x), (-1, heads, x.shape[-1] // heads))
        return self._graph.transpose(split, (1, 0, 2))

    def _query(self, q: Handle, layer: LayerSpec, tokens: str) -> Value:
        query = self._rotate(self._heads(q, layer.heads), layer, tokens)
        return self._times(query, self._graph.scalar(layer.scale))

    def _rotate(self, x: Value, layer: LayerSpec, tokens: str) -> Value:
        graph = self._graph
        half = layer.head_dim // 2
        names = [tokens + rope_name(part, layer) for part in ("cos", "sin")]
        cos, sin = (self._enter(name, (1, half)) for name in names)
        low, high = graph.slice(x, 0, half), graph.slice(x, half, half)
        return graph.concat(
            graph.binary(xnn.XNNSubtract, self._times(low, cos), self._times(high, sin)),
            graph.binary(xnn.XNNAdd, self._times(high, cos), self._times(low, sin)),
        )

    def _attend(self, query: Value, layer: LayerSpec, tokens: str) -> Value:
        """Queries (H, T, D) over the caches of `layer.source`, (K, S, D) each: (T, H · D)."""
        graph, cache = self._graph, self._caches[layer.source]
        heads, kv_heads, slots, width = layer.heads, layer.kv_heads, cache.slots, layer.head_dim
        keys = self._enter(f"key {layer.source}", (kv_heads, slots, width))
        values = self._enter(f"value {layer.source}", (kv_heads, slots, width))
        mask = self._enter(tokens + mask_name(layer), (1, slots))
        grouped = graph.reshape(query, (kv_heads, -1, width))  # (K, G · T, D)
        scores = graph.matmul(grouped, keys, transposed=True)  # (K, G · T, S)
        if layer.softcap is not None:
            scores = self._softcap(scores, layer.softcap)
        scores = graph.unary(xnn.XNNSoftmax, graph.binary(xnn.XNNAdd, scores, mask))
        mixed = graph.matmul(scores, values)
        mixed = graph.transpose(graph.reshape(mixed, (heads, -1, width)), (1, 0, 2))
        return graph.reshape(mixed, (-1, heads * width))

    def _softcap(self, x: Value, cap: float) -> Value:
        graph = self._graph
        squashed = graph.unary(xnn.XNNTanh, self._times(x, graph.scalar(1 / cap)))
        return self._times(squashed, graph.scalar(cap))

    def _swap_pairs(self, x: Value) -> Value:
        """Swap neighbours: ExecuTorch's lookup reads the high nibble first; ours is the low one."""
        graph = self._graph
        width = graph.shape(x)[-1]
        pairs = graph.reshape(x, (-1, width // 2, 2))
        swapped = graph.concat(graph.slice(pairs, 1, 1), graph.slice(pairs, 0, 1))
        return graph.reshape(swapped, (-1, width))


def rope_name(part: str, layer: LayerSpec) -> str:
    """Name of a rope's cosines or sines, (T, D / 2)."""
    rope = layer.rope
    return f"{part} {rope.base:g} {rope.factor:g} {rope.rotated:g} of {layer.head_dim}"


def mask_name(layer: LayerSpec) -> str:
    """Name of the attention mask (G · T, S): 0 for visible slots, a large negative number else."""
    return f"mask {layer.window} for {layer.heads // layer.kv_heads}"


def is_slots(name: str) -> bool:
    """Whether the tensor is a cache or a mask. In all others the second last dimension is T."""
    return name.removeprefix(LAST).startswith(("key ", "value ", "mask "))
