"""The decoder's operations as MIL operations, for one chunk length.

All values are float16. The caller passes cosines, masks and slots, so the device computes no index.
A padding token is written to a trash slot that every mask hides, or not at all.

Shapes: T new tokens, N of them with a query, M width, H query heads, K kv heads, G = H / K,
D head size, S slots.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function

from gemma_export.model.config import PER_LAYER_TABLE, LayerSpec
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.coreml.mil_weights import Weights
from gemma_export.targets.shared.apple import Headroom
from gemma_export.targets.shared.apple_layout import Layout
from gemma_export.targets.shared.float16 import half, half_lookup
from gemma_runtime.manifest import AttentionKind, TensorRole

Var: TypeAlias = Any  # coremltools is untyped

_TINY = np.float16(1e-3)


class MilOps:
    """Implements `Ops`: fills one MIL function per part of the layout, in order."""

    def __init__(
        self,
        layout: Layout,
        functions: Sequence[Function],
        weights: Sequence[Weights],
        tokens: int,
        headroom: Headroom,
        epsilon: float,
    ) -> None:
        self._layout = layout
        self._functions = functions
        self._weights = weights
        self._tokens = tokens
        self._headroom = headroom
        self._epsilon = epsilon
        # Keys and values of the last layer of each kind that has its own: what shared layers read.
        self._lent: dict[AttentionKind, tuple[Var, Var]] = {}
        self._enter(0)

    def finish(self, *outputs: Var) -> None:
        """Set the outputs of the current function and close it."""
        self._function.set_outputs(list(outputs))
        self._function.__exit__(None, None, None)

    def _enter(self, part: int) -> None:
        self._part = part
        self._function = self._functions[part]
        self._function.__enter__()
        self._made: dict[str, Var] = {}
        own = self._layout.parts[part]
        specs = (*self._layout.inputs(own, self._tokens), *self._layout.states(own))
        self._names = {(spec.role, spec.kind): spec.name for spec in specs}
        (self._output,) = (spec.name for spec in self._layout.outputs(own, self._tokens))
        caches = {kind: self._input(TensorRole.CACHE, kind) for kind in self._layout.kinds(own)}
        self._states = {kind: mb.read_state(input=cache) for kind, cache in caches.items()}

    def _input(self, role: TensorRole, kind: AttentionKind | None = None) -> Var:
        return self._function.inputs[self._names[role, kind]]

    def embed(self, table: StoredWeight, scale: float) -> Var:
        if table.name == PER_LAYER_TABLE:
            return mb.mul(x=self._input(TensorRole.PER_LAYER), y=np.float16(scale))
        if self._layout.external:
            rows = self._input(TensorRole.EMBEDDINGS)
        else:
            tokens = self._input(TensorRole.TOKENS)
            rows = mb.gather(x=self._weight(table), indices=tokens, axis=0, validate_indices=False)
        multiplier = half_lookup(table, scale * self._headroom.residual).numpy()
        return mb.mul(x=rows, y=multiplier)  # (T, M)

    def norm(self, x: Var, gain: StoredWeight) -> Var:
        carried, given = self._headroom.norm(gain.name)
        gains = half(gain.name, (1 + gain.rows(0, gain.shape[0])) * given)
        return mb.mul(x=self._normed(x, carried), y=gains.numpy())

    def head_norm(self, x: Var, gain: StoredWeight, heads: int) -> Var:
        return _joined(self.norm(_split(x, heads), gain))

    def value_norm(self, v: Var, layer: LayerSpec) -> Var:
        return _joined(self._normed(_split(v, layer.kv_heads)))

    def project(self, x: Var, weights: Sequence[StoredWeight]) -> list[Var]:
        return [self._product(x, weight) for weight in weights]

    def _product(self, x: Var, weight: StoredWeight) -> Var:
        before, after = self._headroom.matrix(weight.name)
        y = mb.linear(x=self.scaled(x, before), weight=self._weight(weight))
        return self.scaled(y, after)

    def attend(self, q: Var, k: Var, v: Var, layer: LayerSpec) -> Var:
        key = self._rotate(_heads_first(k, layer.kv_heads), layer.kind)
        new = mb.concat(values=[key, _heads_first(v, layer.kv_heads)], axis=0)  # (2K, T, D)
        self._lent[layer.kind] = self._cached(new, layer)
        return self.attend_shared(q, layer)

    def attend_shared(self, q: Var, layer: LayerSpec) -> Var:
        keys, values = self._lent[layer.kind]
        count, seen = int(q.shape[0]), int(keys.shape[1])
        kv_heads, width = layer.kv_heads, layer.head_dim
        query = self._rotate(_heads_first(q, layer.heads), layer.kind)
        query = self.scaled(query, layer.scale)
        grouped = mb.reshape(x=query, shape=[kv_heads, -1, width])  # (K, G · N, D)
        scores = mb.matmul(x=grouped, y=keys, transpose_y=True)
        scores = mb.reshape(x=scores, shape=[layer.heads, count, seen])
        if layer.softcap is not None:
            scores = self._softcap(scores, layer.softcap)
        mask = self._rows(TensorRole.MASK, layer.kind, count)
        shares = mb.softmax(x=mb.add(x=scores, y=mask), axis=-1)
        mixed = mb.matmul(x=mb.reshape(x=shares, shape=[kv_heads, -1, seen]), y=values)
        mixed = mb.reshape(x=mixed, shape=[layer.heads, count, width])
        return _joined(mb.transpose(x=mixed, perm=[1, 0, 2]))  # (N, H · D)

    def add_norm(
        self, x: Var, branch: Var, post: StoredWeight | None, then: StoredWeight
    ) -> tuple[Var, Var]:
        if post is not None:
            branch = self.norm(branch, post)
        return self._next(self.add(x, branch), then)

    def scaled_add_norm(
        self, x: Var, branch: Var, post: StoredWeight, factor: StoredWeight, then: StoredWeight
    ) -> tuple[Var, Var]:
        y = self.add(x, self.norm(branch, post))
        return self._next(self.scaled(y, float(factor.rows(0, 1))), then)

    def _next(self, x: Var, then: StoredWeight) -> tuple[Var, Var]:
        """The residual and its norm, after going on to the part that begins with this norm."""
        if then.name in self._entries():
            self.finish(mb.identity(x=x, name=self._output))
            self._enter(self._part + 1)
            x = self._input(TensorRole.HIDDEN)
        return x, self.norm(x, then)

    def _entries(self) -> set[str]:
        """Name of the first norm weight of every part but the first."""
        later = self._layout.parts[1:]
        return {f"model.layers.{part.layers.start}.input_layernorm.weight" for part in later}

    def add(self, a: Var, b: Var) -> Var:
        return mb.add(x=a, y=b)

    def scaled(self, x: Var, factor: float) -> Var:
        return x if factor == 1 else mb.mul(x=x, y=np.float16(factor))

    def columns(self, x: Var, part: int, parts: int) -> Var:
        count, width = (int(size) for size in x.shape)
        begin, end = [0, part * width // parts], [count, (part + 1) * width // parts]
        return self.scaled(
            mb.slice_by_index(x=x, begin=begin, end=end), self._headroom.per_layer(part)
        )

    def geglu(self, gate: Var, up: Var) -> Var:
        return mb.mul(x=mb.gelu(x=gate, mode="TANH_APPROXIMATION"), y=up)

    def wanted(self, x: Var) -> Var:
        last = self._input(TensorRole.LAST)
        return mb.gather(x=x, indices=last, axis=0, validate_indices=False)

    def logits(self, x: Var, head: StoredWeight, softcap: float | None) -> Var:
        y = mb.linear(x=x, weight=self._weight(head))
        y = y if softcap is None else self._softcap(y, softcap)
        return mb.identity(x=y, name=self._output)  # (1, V)

    def _cached(self, new: Var, layer: LayerSpec) -> tuple[Var, Var]:
        """Write new keys and values; returns those that the queries attend to, (K, S, D) each.

        On local layers, attention reads the ring as it was, followed by the chunk: the chunk's
        first tokens still need the oldest slots, which the chunk overwrites.
        """
        first = self._layout.first_row(layer.index)
        region = {
            "begin": [first, 0, 0],
            "end": [first + 2 * layer.kv_heads, 0, 0],
            "begin_mask": [False, True, True],
            "end_mask": [False, True, True],
        }
        old = mb.slice_by_index(x=self._states[layer.kind], **region)  # (2K, S + trash, D)
        written = (self._blended if self._layout.compute == "ane" else self._scattered)(
            old, new, layer
        )
        state = mb.slice_update(x=self._states[layer.kind], update=written, **region)
        self._states[layer.kind] = mb.coreml_update_state(
            state=self._input(TensorRole.CACHE, layer.kind), value=state
        )
        seen = written
        if layer.kind is AttentionKind.LOCAL:
            slots = self._layout.caches[layer.index].slots
            end = [2 * layer.kv_heads, slots, layer.head_dim]
            ring = mb.slice_by_index(x=old, begin=[0, 0, 0], end=end)
            seen = mb.concat(values=[ring, new], axis=1)
        keys, values = mb.split(x=seen, num_splits=2, axis=0)
        return keys, values

    def _scattered(self, old: Var, new: Var, layer: LayerSpec) -> Var:
        places = self._input(TensorRole.SLOTS, layer.kind)
        slots = mb.reshape(x=places, shape=[1, self._tokens, 1])
        return mb.scatter_along_axis(
            data=old,
            indices=mb.tile(x=slots, reps=[2 * layer.kv_heads, 1, layer.head_dim]),
            updates=new,
            axis=1,
            mode="update",
            validate_indices=False,
        )

    def _blended(self, old: Var, new: Var, layer: LayerSpec) -> Var:
        """old · (1 - written) + one-hot · new: exact, from operations of the Neural Engine."""
        onehot = self._input(TensorRole.WRITE, layer.kind)  # (S, T); padding columns are 0
        key = f"kept {layer.kind}"
        if key not in self._made:
            written = mb.reduce_sum(x=onehot, axes=[1], keep_dims=True)
            self._made[key] = mb.sub(x=np.float16(1), y=written)  # (S, 1)
        return mb.add(x=mb.mul(x=old, y=self._made[key]), y=mb.matmul(x=onehot, y=new))

    def _normed(self, x: Var, carried: float = 1.0) -> Var:
        """RMSNorm without a gain that does not overflow float16.

        x / m / √(mean((x / m)²) + ε / m²), with m = max |x|. `carried` is the headroom factor in x;
        ε is scaled by it to keep its meaning. The last product takes x, not x / m: beside an
        outlier of 1e4, the other elements of x / m would fall into float16's subnormal range and
        lose bits.
        """
        largest = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True), y=_TINY)
        scaled = mb.real_div(x=x, y=largest)
        square = mb.reduce_mean(x=mb.mul(x=scaled, y=scaled), axes=[-1], keep_dims=True)
        floor = mb.real_div(x=np.float16(self._epsilon**0.5 * carried), y=largest)
        square = mb.add(x=square, y=mb.mul(x=floor, y=floor))
        return mb.mul(x=x, y=mb.real_div(x=mb.rsqrt(x=square), y=largest))

    def _weight(self, weight: StoredWeight) -> Var:
        """The weight as a constant; one per function."""
        if weight.name not in self._made:
            self._made[weight.name] = self._weights[self._part].constant(weight)
        return self._made[weight.name]

    def _rows(self, role: TensorRole, kind: AttentionKind, count: int) -> Var:
        """An input with a row per token: all rows, or only those of the wanted positions."""
        if count == self._tokens:
            return self._input(role, kind)
        key = f"wanted {role} {kind}"
        if key not in self._made:
            self._made[key] = self.wanted(self._input(role, kind))
        return self._made[key]

    def _rotate(self, x: Var, kind: AttentionKind) -> Var:
        """Rotate heads (heads, N, D)."""
        count = int(x.shape[1])
        cos, sin = (self._rows(role, kind, count) for role in (TensorRole.COS, TensorRole.SIN))
        low, high = mb.split(x=x, num_splits=2, axis=-1)
        return mb.concat(
            values=[
                mb.sub(x=mb.mul(x=low, y=cos), y=mb.mul(x=high, y=sin)),
                mb.add(x=mb.mul(x=high, y=cos), y=mb.mul(x=low, y=sin)),
            ],
            axis=-1,
        )

    def _softcap(self, x: Var, cap: float) -> Var:
        return mb.mul(x=mb.tanh(x=mb.mul(x=x, y=np.float16(1 / cap))), y=np.float16(cap))


def _split(x: Var, heads: int) -> Var:
    count, width = (int(size) for size in x.shape)
    return mb.reshape(x=x, shape=[count, heads, width // heads])  # (T, heads, D)


def _joined(x: Var) -> Var:
    count, heads, width = (int(size) for size in x.shape)
    return mb.reshape(x=x, shape=[count, heads * width])  # (T, heads · D)


def _heads_first(x: Var, heads: int) -> Var:
    return mb.transpose(x=_split(x, heads), perm=[1, 0, 2])  # (heads, T, D)
