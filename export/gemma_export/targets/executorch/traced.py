"""The decoder as a torch module, for delegates that lower a traced graph: Vulkan, Core ML.

Shapes: T new tokens, M width, H query heads, K kv heads, G = H / K, D head size, S slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export.formats.codes import signed
from gemma_export.model.config import GemmaConfig, LayerSpec
from gemma_export.model.decoder import decoder
from gemma_export.model.ops import RegularOps
from gemma_export.model.torch_ops import rotate_halves, soft_capped
from gemma_export.quantize.store import QuantizedStore, StoredWeight
from gemma_export.targets.executorch.frame import CachedFrame
from gemma_export.targets.executorch.ops import mask_name, rope_name
from gemma_export.targets.shared.traced import buffer_name, heads_first
from gemma_runtime.manifest import LayerCache


class TracedFrame(CachedFrame):
    """From tokens (1, T) and the first one's position (1,) to the last one's logits (1, 1, V)."""

    def __init__(
        self,
        config: GemmaConfig,
        caches: Sequence[LayerCache],
        context: int,
        store: QuantizedStore,
    ) -> None:
        super().__init__(config, caches, context)
        self._config = config
        self._store = store
        for name in config.tensor_shapes():
            self._register(store.weight(name))

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        ops = TracedOps(self, tokens, start, self._config.rms_norm_eps)
        return decoder(ops, self._config, self._store.weight)[None]

    def weight(self, weight: StoredWeight) -> Tensor:
        """The weight as float32; codes are dequantized by an operator that delegates recognize."""
        name = buffer_name(weight.name)
        if weight.format.is_float:
            return self.get_buffer(name)
        dense: Tensor = torch.ops.torchao.dequantize_affine(
            self.get_buffer(f"{name}_codes"),
            [1, weight.format.group],
            self.get_buffer(f"{name}_scales"),
            self.get_buffer(f"{name}_zeros"),
            torch.int8,
            -8,
            7,
            output_dtype=torch.float32,
        )
        return dense

    def _register(self, weight: StoredWeight) -> None:
        name, rows = buffer_name(weight.name), weight.shape[0]
        if weight.format.is_float:
            values = weight.rows(0, rows)
            self.register_buffer(name, values if values.dim() == 2 else 1 + values)
            return
        part = weight.codes(0, rows)
        self.register_buffer(f"{name}_codes", signed(part.codes, 4, weight.shape[1]))
        self.register_buffer(f"{name}_scales", part.scales.float())
        self.register_buffer(f"{name}_zeros", torch.zeros_like(part.scales, dtype=torch.int8))


class TracedOps(RegularOps[Tensor, StoredWeight]):
    """Implements `Ops` in plain torch on the frame's caches."""

    def __init__(self, frame: TracedFrame, tokens: Tensor, start: Tensor, epsilon: float) -> None:
        self._frame = frame
        self._tokens = tokens
        self._epsilon = epsilon
        self._position = torch.arange(tokens.shape[1]) + start  # (T,)
        all_slots = {cache.slots: cache.slots for cache in frame.caches}
        self._known = frame.positional(self._position, all_slots, frame.owners)

    def embed(self, table: StoredWeight, scale: float) -> Tensor:
        return functional.embedding(self._tokens[0], self._frame.weight(table)) * scale  # (T, M)

    def norm(self, x: Tensor, gain: StoredWeight) -> Tensor:
        mean = (x * x).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self._epsilon) * self._frame.weight(gain)

    def head_norm(self, x: Tensor, gain: StoredWeight, heads: int) -> Tensor:
        return self.norm(x.view(x.shape[0], heads, -1), gain).view(x.shape[0], -1)

    def project(self, x: Tensor, weights: Sequence[StoredWeight]) -> list[Tensor]:
        return [functional.linear(x, self._frame.weight(weight)) for weight in weights]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        query, key = (
            self._rotate(heads_first(x, n), layer)
            for x, n in ((q, layer.heads), (k, layer.kv_heads))
        )
        value = heads_first(v, layer.kv_heads)
        keys, values = self._frame.write(layer.index, key, value, self._position)
        grouped = (query * layer.scale).reshape(layer.kv_heads, -1, layer.head_dim)
        scores = torch.bmm(grouped, keys.transpose(1, 2))  # (K, G · T, S)
        scores = soft_capped(scores, layer.softcap)
        shares = torch.softmax(scores + self._known[mask_name(layer)], -1)
        mixed = torch.bmm(shares, values).view(layer.heads, -1, layer.head_dim)
        return mixed.transpose(0, 1).reshape(-1, layer.heads * layer.head_dim)  # (T, H · D)

    def add_norm(
        self, x: Tensor, branch: Tensor, post: StoredWeight | None, then: StoredWeight
    ) -> tuple[Tensor, Tensor]:
        x = x + (branch if post is None else self.norm(branch, post))
        return x, self.norm(x, then)

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """By hand: a delegate may take gelu's tanh form for erf's."""
        inner = 0.7978845608028654 * gate * (1 + 0.044715 * gate * gate)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up

    def wanted(self, x: Tensor) -> Tensor:
        return x[-1:]

    def logits(self, x: Tensor, table: StoredWeight, softcap: float | None) -> Tensor:
        y = functional.linear(x, self._frame.weight(table))
        return soft_capped(y, softcap)

    def _rotate(self, x: Tensor, layer: LayerSpec) -> Tensor:
        cos, sin = (self._known[rope_name(part, layer)] for part in ("cos", "sin"))
        return rotate_halves(x, cos, sin)
