"""The decoder's operations as MIL operations, for one chunk length.

All values are float16. The caller passes cosines, masks and slots, so the device computes no index.
A padding token is written to a trash slot that every mask hides, or not at all.

Shapes: T new tokens, M width, H query heads, K kv heads, G = H / K, D head size, S slots.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function

from gemma_export.model.config import LayerSpec
from gemma_export.model.ops import RegularOps
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.coreml.mil_weights import Weights
from gemma_export.targets.shared.apple import is_added
from gemma_export.targets.shared.apple_layout import Layout
from gemma_runtime.manifest import AttentionKind, TensorRole

Var: TypeAlias = Any  # coremltools is untyped

_TINY = np.float16(1e-3)


class MilOps(RegularOps[Var, StoredWeight]):
    """Implements `Ops`: fills one MIL function per part of the layout, in order."""

    def __init__(
        self,
        layout: Layout,
        functions: Sequence[Function],
        weights: Sequence[Weights],
        tokens: int,
        headroom: float,
        epsilon: float,
    ) -> None:
        self._layout = layout
        self._functions = functions
        self._weights = weights
        self._tokens = tokens
        self._headroom = headroom  # factor of the residual, see `apple.headroom_factor`
        self._epsilon = epsilon
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
        if self._layout.external:
            rows = self._input(TensorRole.EMBEDDINGS)
        else:
            tokens = self._input(TensorRole.TOKENS)
            rows = mb.gather(x=self._weight(table), indices=tokens, axis=0, validate_indices=False)
        return mb.mul(x=rows, y=np.float16(scale * self._headroom))  # (T, M)

    def norm(self, x: Var, gain: StoredWeight) -> Var:
        return self._norm(x, gain, 1.0, folded=self._headroom)

    def head_norm(self, x: Var, gain: StoredWeight, heads: int) -> Var:
        width = int(x.shape[-1])
        split = mb.reshape(x=x, shape=[self._tokens, heads, width // heads])
        return mb.reshape(x=self._norm(split, gain, 1.0), shape=[self._tokens, width])

    def project(self, x: Var, weights: Sequence[StoredWeight]) -> list[Var]:
        if self._headroom != 1 and is_added(self._layout.config, weights[0].name):
            x = mb.mul(x=x, y=np.float16(self._headroom))
        return [mb.linear(x=x, weight=self._weight(weight)) for weight in weights]

    def attend(self, q: Var, k: Var, v: Var, layer: LayerSpec) -> Var:
        query = self._rotate(self._heads(q, layer.heads), layer.kind)
        query = mb.mul(x=query, y=np.float16(layer.scale))
        key = self._rotate(self._heads(k, layer.kv_heads), layer.kind)
        new = mb.concat(values=[key, self._heads(v, layer.kv_heads)], axis=0)  # (2K, T, D)
        keys, values = self._cached(new, layer)
        kv_heads, width = layer.kv_heads, layer.head_dim
        grouped = mb.reshape(x=query, shape=[kv_heads, -1, width])  # (K, G · T, D)
        scores = mb.matmul(x=grouped, y=keys, transpose_y=True)
        seen = int(keys.shape[1])
        scores = mb.reshape(x=scores, shape=[layer.heads, self._tokens, seen])
        if layer.softcap is not None:
            scores = self._softcap(scores, layer.softcap)
        mask = self._input(TensorRole.MASK, layer.kind)
        shares = mb.softmax(x=mb.add(x=scores, y=mask), axis=-1)
        mixed = mb.matmul(x=mb.reshape(x=shares, shape=[kv_heads, -1, seen]), y=values)
        mixed = mb.reshape(x=mixed, shape=[layer.heads, self._tokens, width])
        joined = mb.transpose(x=mixed, perm=[1, 0, 2])
        return mb.reshape(x=joined, shape=[self._tokens, layer.heads * width])  # (T, H · D)

    def add_norm(
        self, x: Var, branch: Var, post: StoredWeight | None, then: StoredWeight
    ) -> tuple[Var, Var]:
        if post is not None:
            branch = self._norm(branch, post, self._headroom)
        x = mb.add(x=x, y=branch)
        if then.name in self._entries():
            self.finish(mb.identity(x=x, name=self._output))
            self._enter(self._part + 1)
            x = self._input(TensorRole.HIDDEN)
        return x, self.norm(x, then)

    def _entries(self) -> set[str]:
        """Name of the first norm weight of every part but the first."""
        later = self._layout.parts[1:]
        return {f"model.layers.{part.layers.start}.input_layernorm.weight" for part in later}

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

    def _norm(self, x: Var, gain: StoredWeight, factor: float, folded: float = 1.0) -> Var:
        """RMSNorm that does not overflow float16: x / m / √(mean((x / m)²) + ε / m²), m = max |x|.

        `folded` is the headroom factor that x carries; ε is scaled by it to keep its meaning. The
        last product takes x, not x / m: beside an outlier of 1e4, the other elements of x / m
        would fall into float16's subnormal range and lose bits.
        """
        largest = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True), y=_TINY)
        scaled = mb.real_div(x=x, y=largest)
        square = mb.reduce_mean(x=mb.mul(x=scaled, y=scaled), axes=[-1], keep_dims=True)
        floor = mb.real_div(x=np.float16(self._epsilon**0.5 * folded), y=largest)
        square = mb.add(x=square, y=mb.mul(x=floor, y=floor))
        normed = mb.mul(x=x, y=mb.real_div(x=mb.rsqrt(x=square), y=largest))
        gains = (1 + gain.rows(0, gain.shape[0]).numpy()) * factor
        return mb.mul(x=normed, y=gains.astype(np.float16))

    def _weight(self, weight: StoredWeight) -> Var:
        """The weight as a constant; one per function."""
        if weight.name not in self._made:
            self._made[weight.name] = self._weights[self._part].constant(weight)
        return self._made[weight.name]

    def _heads(self, x: Var, heads: int) -> Var:
        split = mb.reshape(x=x, shape=[self._tokens, heads, int(x.shape[-1]) // heads])
        return mb.transpose(x=split, perm=[1, 0, 2])  # (heads, T, D)

    def _rotate(self, x: Var, kind: AttentionKind) -> Var:
        cos, sin = (
            self._input(role, kind) for role in (TensorRole.COS, TensorRole.SIN)
        )  # (T, D / 2)
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
