"""The decoder as a torch module of one chunk length, for torch.export.

All values are float16. The caller passes cosines, masks and slots, so the device computes no index.
Padded tokens are written to a trash slot, which every mask hides.

Shapes: T new tokens, N of them with a query, M width, H query heads, K kv heads, G = H / K,
D head size, S slots.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemma_export.formats.codes import signed
from gemma_export.model.config import PER_LAYER_TABLE, LayerSpec, is_gain
from gemma_export.model.decoder import decoder
from gemma_export.model.torch_ops import rotate_halves
from gemma_export.progress import Tick
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets import ExportJob
from gemma_export.targets.shared.apple import Headroom
from gemma_export.targets.shared.apple_layout import Layout
from gemma_export.targets.shared.float16 import check_scales, half, half_lookup
from gemma_export.targets.shared.traced import buffer_name, heads_first
from gemma_runtime.manifest import AttentionKind, TensorRole

_TINY = 1e-3
_LOOKUP = "lookup_scale"  # the buffer with what looked-up rows are multiplied by
_INT4 = torch.int4  # type: ignore[attr-defined]  # missing in torch's stubs


Inputs: TypeAlias = Mapping[tuple[TensorRole, AttentionKind | None], Tensor]


class Step(nn.Module):
    """The weights, shared by all functions, and the caches as states."""

    def __init__(
        self,
        job: ExportJob,
        layout: Layout,
        progress: Tick,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.headroom = Headroom.of(job)
        self._config, self._store = job.config, job.store
        names = [name for name in job.config.tensor_shapes() if name != PER_LAYER_TABLE]
        self._states = {state.kind: state.name for state in layout.states(layout.parts[0])}
        for state in layout.states(layout.parts[0]):
            shape = [int(size) for size in state.shape]
            self.register_buffer(state.name, torch.zeros(shape, dtype=torch.float16))
        self.scalars: dict[str, float] = {}  # that multiply the layers' outputs
        for name in names:
            weight = job.store.weight(name)
            self._register(weight)
            progress(name, math.prod(weight.shape) // 2)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the logits after the last token, (1, V). Inputs are in the layout's order."""
        specs = self.layout.inputs(self.layout.parts[0], len(inputs[0]))
        given = {(s.role, s.kind): value for s, value in zip(specs, inputs, strict=True)}
        ops = StepOps(self, given, self._config.rms_norm_eps)
        return decoder(ops, self._config, self._store.weight)

    def state(self, kind: AttentionKind) -> Tensor:
        return self.get_buffer(self._states[kind])

    def matrix(self, weight: StoredWeight) -> Tensor:
        """A float16 matrix, or the operation that dequantizes its codes in Core AI."""
        name = buffer_name(weight.name)
        if weight.format.is_float:
            return self.get_buffer(name)
        dense: Tensor = torch.ops.coreai.constexpr_blockwise_shift_scale(
            self.get_buffer(f"{name}_codes"),
            self.get_buffer(f"{name}_scales"),
            self.get_buffer(f"{name}_zeros") if weight.format.asymmetric else None,
            None,
            torch.int8 if weight.format.bits == 8 else _INT4,
            torch.float16,
        )
        return dense

    def lookup(self, scale: float) -> Tensor | float:
        """What looked-up rows are multiplied by: a number, or (M,) if the table has factors."""
        if _LOOKUP in self._buffers:
            return self.get_buffer(_LOOKUP)
        return scale * self.headroom.residual

    def gain(self, weight: StoredWeight) -> Tensor:
        return self.get_buffer(buffer_name(weight.name))

    def _register(self, weight: StoredWeight) -> None:
        """Gains contain the headroom factor of what they give."""
        name, rows = buffer_name(weight.name), weight.shape[0]
        if weight.factors is not None:
            scale = self._config.embed_scale * self.headroom.residual
            self.register_buffer(_LOOKUP, half_lookup(weight, scale))
        if is_gain(weight.name):
            _, given = self.headroom.norm(weight.name)
            self.register_buffer(name, half(weight.name, (1 + weight.rows(0, rows)) * given))
        elif len(weight.shape) == 1:
            self.scalars[weight.name] = float(weight.rows(0, 1))
        elif weight.format.is_float:
            self.register_buffer(name, half(weight.name, weight.rows(0, rows)))
        else:
            part, bits = weight.codes(0, rows), weight.format.bits
            self.register_buffer(f"{name}_codes", signed(part.codes, bits, weight.shape[1]))
            scales = check_scales(weight.name, part.scales, weight.format)
            self.register_buffer(f"{name}_scales", scales)
            if part.zeros is not None:
                zeros = signed(part.zeros, bits, part.scales.shape[1])
                self.register_buffer(f"{name}_zeros", zeros)


class StepOps:
    """The decoder's operations in plain torch, on a step's weights and states."""

    def __init__(self, step: Step, inputs: Inputs, epsilon: float) -> None:
        self._step = step
        self._inputs = inputs
        self._epsilon = epsilon
        self._headroom = step.headroom
        # Keys and values of the last layer of each kind that has its own: what shared layers read.
        self._lent: dict[AttentionKind, tuple[Tensor, Tensor]] = {}

    def embed(self, table: StoredWeight, scale: float) -> Tensor:
        if table.name == PER_LAYER_TABLE:
            return self._inputs[TensorRole.PER_LAYER, None] * scale
        rows = functional.embedding(self._inputs[TensorRole.TOKENS, None], self._step.matrix(table))
        return rows * self._step.lookup(scale)  # (T, M)

    def norm(self, x: Tensor, gain: StoredWeight) -> Tensor:
        carried, _ = self._headroom.norm(gain.name)
        return self._normed(x, carried) * self._step.gain(gain)

    def head_norm(self, x: Tensor, gain: StoredWeight, heads: int) -> Tensor:
        return self.norm(x.view(x.shape[0], heads, -1), gain).view(x.shape[0], -1)

    def value_norm(self, v: Tensor, layer: LayerSpec) -> Tensor:
        return self._normed(v.view(v.shape[0], layer.kv_heads, -1)).view(v.shape[0], -1)

    def project(self, x: Tensor, weights: Sequence[StoredWeight]) -> list[Tensor]:
        return [self._product(x, weight) for weight in weights]

    def _product(self, x: Tensor, weight: StoredWeight) -> Tensor:
        before, after = self._headroom.matrix(weight.name)
        y = functional.linear(self.scaled(x, before), self._step.matrix(weight))
        return self.scaled(y, after)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        key = self._rotate(heads_first(k, layer.kv_heads), layer.kind)
        new = torch.cat((key, heads_first(v, layer.kv_heads)))  # (2K, T, D)
        keys, values = self._cached(new, layer).chunk(2)  # (K, S, D) each
        self._lent[layer.kind] = keys, values
        return self.attend_shared(q, layer)

    def attend_shared(self, q: Tensor, layer: LayerSpec) -> Tensor:
        keys, values = self._lent[layer.kind]
        query = self._rotate(heads_first(q, layer.heads), layer.kind)
        query = self.scaled(query, layer.scale)
        grouped = query.reshape(layer.kv_heads, -1, layer.head_dim)  # (K, G · N, D)
        scores = torch.bmm(grouped, keys.transpose(1, 2))
        scores = scores.view(layer.heads, -1, keys.shape[1])
        if layer.softcap is not None:
            scores = _softcap(scores, layer.softcap)
        mask = self._rows(TensorRole.MASK, layer.kind, q.shape[0])
        shares = torch.softmax(scores + mask, -1)
        mixed = torch.bmm(shares.view(layer.kv_heads, -1, keys.shape[1]), values)
        mixed = mixed.view(layer.heads, -1, layer.head_dim)
        return mixed.transpose(0, 1).reshape(-1, layer.heads * layer.head_dim)  # (N, H · D)

    def add_norm(
        self, x: Tensor, branch: Tensor, post: StoredWeight | None, then: StoredWeight
    ) -> tuple[Tensor, Tensor]:
        x = x + (branch if post is None else self.norm(branch, post))
        return x, self.norm(x, then)

    def scaled_add_norm(
        self,
        x: Tensor,
        branch: Tensor,
        post: StoredWeight,
        factor: StoredWeight,
        then: StoredWeight,
    ) -> tuple[Tensor, Tensor]:
        x = self.scaled(x + self.norm(branch, post), self._step.scalars[factor.name])
        return x, self.norm(x, then)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        return x if factor == 1 else x * factor

    def columns(self, x: Tensor, part: int, parts: int) -> Tensor:
        return self.scaled(x.chunk(parts, -1)[part], self._headroom.per_layer(part))

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.gelu(gate, approximate="tanh") * up

    def wanted(self, x: Tensor) -> Tensor:
        return x[self._inputs[TensorRole.LAST, None]]

    def logits(self, x: Tensor, head: StoredWeight, softcap: float | None) -> Tensor:
        y = functional.linear(x, self._step.matrix(head))
        return y if softcap is None else _softcap(y, softcap)  # (1, V)

    def _cached(self, new: Tensor, layer: LayerSpec) -> Tensor:
        """Write new keys and values; returns what the queries attend to, (2K, S, D).

        A ring is read before it is written, because the chunk's first tokens still need its oldest
        slots. Local layers therefore attend to the old ring followed by the chunk.
        """
        rows, state = 2 * layer.kv_heads, self._step.state(layer.kind)
        first = self._step.layout.first_row(layer.index)
        old = state[first : first + rows]
        places = self._inputs[TensorRole.SLOTS, layer.kind].view(1, -1, 1).expand(new.shape)
        written = old.scatter(1, places, new)
        seen = written
        if layer.kind is AttentionKind.LOCAL:
            seen = torch.cat((old[:, : self._step.layout.caches[layer.index].slots], new), 1)
        state[first : first + rows] = written
        return seen

    def _normed(self, x: Tensor, carried: float = 1.0) -> Tensor:
        """RMSNorm without a gain or overflow: x / m / √(mean((x / m)²) + ε / m²) with m = max |x|.

        `carried` is the headroom factor in x; it scales ε accordingly. The last product
        uses x instead of x / m: with an outlier of 1e4, most of x / m would be subnormal in
        float16.
        """
        largest = x.abs().amax(-1, keepdim=True).clamp(min=_TINY)
        scaled = x / largest
        floor = self._epsilon**0.5 * carried / largest
        square = (scaled * scaled).mean(-1, keepdim=True) + floor * floor
        return x * (torch.rsqrt(square) / largest)

    def _rows(self, role: TensorRole, kind: AttentionKind, count: int) -> Tensor:
        """An input with a row per token: all rows, or only those of the wanted positions."""
        every = self._inputs[role, kind]
        return every if len(every) == count else self.wanted(every)

    def _rotate(self, x: Tensor, kind: AttentionKind) -> Tensor:
        """Rotate heads (heads, N, D)."""
        count = x.shape[1]
        cos, sin = (self._rows(role, kind, count) for role in (TensorRole.COS, TensorRole.SIN))
        return rotate_halves(x, cos, sin)


def _softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x * (1 / cap)) * cap
