"""The decoder's vocabulary as MIL operations, for one function of one chunk length.

Values are float16 throughout. The caller brings masks and slots, so that no index is computed on
the device; a padded token goes to a trash slot that no mask shows.

Shapes: T new tokens, M width, H query heads, K kv heads, G = H / K, D head size, S slots.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from numpy.typing import NDArray

from gemma_export.config import LayerSpec, Rope
from gemma_export.quantize.pack import unpack
from gemma_export.quantize.store import StoredWeight
from gemma_export.rope import rope_angles
from gemma_export.targets.apple import first_row, used_kinds
from gemma_runtime.manifest import AttentionKind, LayerCache

Var: TypeAlias = Any  # coremltools has no types
Half: TypeAlias = NDArray[np.float16]

_TINY = np.float16(1e-3)


class Weights:
    """A store's weights as MIL constants, made once for all functions."""

    def __init__(self) -> None:
        self._codes: dict[str, tuple[NDArray[Any], Half]] = {}

    def codes(self, weight: StoredWeight) -> tuple[NDArray[Any], Half]:
        """Signed int4 codes (N, K) and scales (N, G)."""
        if weight.name not in self._codes:
            part = weight.codes(0, weight.shape[0])
            signed = unpack(part.codes, 4, weight.shape[1]).numpy().astype(np.int8) - np.int8(8)
            self._codes[weight.name] = signed.astype(types.np_int4_dtype), part.scales.numpy()
        return self._codes[weight.name]


class MilOps:
    """`inputs` are the function's own: tokens, positions, slots, masks, states."""

    def __init__(
        self,
        inputs: Mapping[str, Var],
        weights: Weights,
        caches: Sequence[LayerCache],
        context_length: int,
        headroom: float,
        epsilon: float,
    ) -> None:
        self._inputs = inputs
        self._weights = weights
        self._caches = caches
        self._context_length = context_length
        self._headroom = headroom  # folded into the residual, see `apple.headroom_factor`
        self._epsilon = epsilon
        self._tokens = int(inputs["tokens"].shape[0])
        self._made: dict[str, Var] = {}
        self._states = {
            kind: mb.read_state(input=inputs[f"{kind}_cache"]) for kind in used_kinds(caches)
        }

    def embed(self, table: StoredWeight, scale: float) -> Var:
        rows = mb.gather(
            x=self._weight(table), indices=self._inputs["tokens"], axis=0, validate_indices=False
        )
        return mb.mul(x=rows, y=np.float16(scale * self._headroom))  # (T, M)

    def norm(self, x: Var, gain: StoredWeight) -> Var:
        return self._norm(x, gain, 1.0, folded=self._headroom)

    def head_norm(self, x: Var, gain: StoredWeight, heads: int) -> Var:
        width = int(x.shape[-1])
        split = mb.reshape(x=x, shape=[self._tokens, heads, width // heads])
        return mb.reshape(x=self._norm(split, gain, 1.0), shape=[self._tokens, width])

    def project(self, x: Var, weights: Sequence[StoredWeight]) -> list[Var]:
        return [mb.linear(x=x, weight=self._weight(weight)) for weight in weights]

    def attend(self, q: Var, k: Var, v: Var, layer: LayerSpec) -> Var:
        query = self._rotate(self._heads(q, layer.heads), layer.rope, layer.head_dim)
        query = mb.mul(x=query, y=np.float16(layer.scale))
        key = self._rotate(self._heads(k, layer.kv_heads), layer.rope, layer.head_dim)
        new = mb.concat(values=[key, self._heads(v, layer.kv_heads)], axis=0)  # (2K, T, D)
        keys, values = self._cached(new, layer)
        kv_heads, width = layer.kv_heads, layer.head_dim
        grouped = mb.reshape(x=query, shape=[kv_heads, -1, width])  # (K, G · T, D)
        scores = mb.matmul(x=grouped, y=keys, transpose_y=True)
        seen = int(keys.shape[1])
        scores = mb.reshape(x=scores, shape=[layer.heads, self._tokens, seen])
        if layer.softcap is not None:
            scores = self._softcap(scores, layer.softcap)
        mask = self._inputs[f"{layer.kind.value}_mask"]
        shares = mb.softmax(x=mb.add(x=scores, y=mask), axis=-1)
        mixed = mb.matmul(x=mb.reshape(x=shares, shape=[kv_heads, -1, seen]), y=values)
        mixed = mb.reshape(x=mixed, shape=[layer.heads, self._tokens, width])
        joined = mb.transpose(x=mixed, perm=[1, 0, 2])
        return mb.reshape(x=joined, shape=[self._tokens, layer.heads * width])  # (T, H · D)

    def add_norm(
        self, x: Var, branch: Var, post: StoredWeight, then: StoredWeight
    ) -> tuple[Var, Var]:
        x = mb.add(x=x, y=self._norm(branch, post, self._headroom))
        return x, self.norm(x, then)

    def geglu(self, gate: Var, up: Var) -> Var:
        return mb.mul(x=mb.gelu(x=gate, mode="TANH_APPROXIMATION"), y=up)

    def wanted(self, x: Var) -> Var:
        return mb.gather(x=x, indices=self._inputs["last"], axis=0, validate_indices=False)

    def logits(self, x: Var, table: StoredWeight, softcap: float | None) -> Var:
        y = mb.linear(x=x, weight=self._weight(table))
        y = y if softcap is None else self._softcap(y, softcap)
        return mb.identity(x=y, name="logits")  # (1, V)

    def _cached(self, new: Var, layer: LayerSpec) -> tuple[Var, Var]:
        """Write new keys and values; what the queries may look at, (K, S, D) each.

        A ring is read before it is written: its oldest slots are what the chunk's first tokens
        still need, so they see the old ring and, behind it, the chunk.
        """
        kind, cache = layer.kind, self._caches[layer.index]
        first = first_row(self._caches, layer.index)
        region = {
            "begin": [first, 0, 0],
            "end": [first + 2 * layer.kv_heads, 0, 0],
            "begin_mask": [False, True, True],
            "end_mask": [False, True, True],
        }
        old = mb.slice_by_index(x=self._states[kind.value], **region)  # (2K, S + TRASH, D)
        slots = mb.reshape(x=self._inputs[f"{kind.value}_slots"], shape=[1, self._tokens, 1])
        places = mb.tile(x=slots, reps=[2 * layer.kv_heads, 1, layer.head_dim])
        written = mb.scatter_along_axis(
            data=old, indices=places, updates=new, axis=1, mode="update", validate_indices=False
        )
        state = mb.slice_update(x=self._states[kind.value], update=written, **region)
        self._states[kind.value] = mb.coreml_update_state(
            state=self._inputs[f"{kind.value}_cache"], value=state
        )
        seen = written
        if kind is AttentionKind.LOCAL:
            ring = mb.slice_by_index(
                x=old, begin=[0, 0, 0], end=[2 * layer.kv_heads, cache.slots, layer.head_dim]
            )
            seen = mb.concat(values=[ring, new], axis=1)
        keys, values = mb.split(x=seen, num_splits=2, axis=0)
        return keys, values

    def _norm(self, x: Var, gain: StoredWeight, factor: float, folded: float = 1.0) -> Var:
        """RMSNorm by m = max |x|: x / m · 1 / √(mean((x / m)²) + ε / m²), which no float16 overflows.

        `folded` is the headroom factor that x carries, so that ε means what it means without.
        x itself is multiplied, not x / m: beside an outlier of 1e4 the rest of it would sink to
        where float16 has few bits left.
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
        """One constant per function, and one blob for all functions."""
        if weight.name not in self._made:
            made = self._constant(weight)
            self._made[weight.name] = made
            for key, value in made.op.inputs.items():
                if value is not None and value.op is not None and value.op.op_type == "const":
                    value.op.weight_id = f"{weight.name}.{key}"
            if made.op.op_type == "const":
                made.op.weight_id = weight.name
        return self._made[weight.name]

    def _constant(self, weight: StoredWeight) -> Var:
        name = weight.name.replace(".", "_")
        if weight.format.is_float:
            values = weight.rows(0, weight.shape[0]).numpy().astype(np.float16)
            return mb.const(val=values, name=name)
        codes, scales = self._weights.codes(weight)
        return mb.constexpr_blockwise_shift_scale(data=codes, scale=scales, name=name)

    def _heads(self, x: Var, heads: int) -> Var:
        split = mb.reshape(x=x, shape=[self._tokens, heads, int(x.shape[-1]) // heads])
        return mb.transpose(x=split, perm=[1, 0, 2])  # (heads, T, D)

    def _rotate(self, x: Var, rope: Rope, width: int) -> Var:
        cos, sin = self._rope(rope, width)
        low, high = mb.split(x=x, num_splits=2, axis=-1)
        return mb.concat(
            values=[
                mb.sub(x=mb.mul(x=low, y=cos), y=mb.mul(x=high, y=sin)),
                mb.add(x=mb.mul(x=high, y=cos), y=mb.mul(x=low, y=sin)),
            ],
            axis=-1,
        )

    def _rope(self, rope: Rope, width: int) -> tuple[Var, Var]:
        """cos and sin at the new tokens' positions: (T, D / 2) each."""
        if f"cos {rope}" not in self._made:
            angle = rope_angles(rope, self._context_length, width)
            for part, table in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
                self._made[f"{part} {rope}"] = mb.gather(
                    x=table.astype(np.float16),
                    indices=self._inputs["positions"],
                    axis=0,
                    validate_indices=False,
                )
        return self._made[f"cos {rope}"], self._made[f"sin {rope}"]

    def _softcap(self, x: Var, cap: float) -> Var:
        return mb.mul(x=mb.tanh(x=mb.mul(x=x, y=np.float16(1 / cap))), y=np.float16(cap))
