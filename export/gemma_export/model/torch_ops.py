"""The reference implementation: float32, eager, a whole prompt in one call.

Weights are read by blocks of rows, so even a 27b needs memory for only one block of weights. They
are moved to where the activations are, which is the device of the tokens.
Tested against transformers' eager attention, because its sdpa path drops Gemma 2's softcap.

Shapes: B batch, T tokens, N of them with a query, M width, H query heads, K kv heads, G = H / K,
D head size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export.formats.blocks import row_blocks
from gemma_export.model.config import LayerSpec
from gemma_export.model.int8_cache import LayerScales, round_cached
from gemma_export.model.ops import Weight, lookup_scale
from gemma_export.parallel import in_order
from gemma_runtime.backends.rope import rope_angles
from gemma_runtime.manifest import AttentionKind, Rope


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) · (1 + gain), over the last dimension."""
    return functional.rms_norm(x, x.shape[-1:], 1 + gain, epsilon)


class TorchOps:
    """Computes the logits of the last `judged` positions of every prompt: (B, judged, V).

    `caches` are the scales of int8 caches, by layer; without them, caches are float32.
    """

    def __init__(
        self,
        tokens: Tensor,
        epsilon: float,
        judged: int | None = None,
        caches: Sequence[LayerScales] | None = None,
    ) -> None:
        self._tokens = tokens  # (B, T)
        self._epsilon = epsilon
        self._caches = caches
        self._judged = min(judged or tokens.shape[1], tokens.shape[1])
        self.max_abs = 0.0  # largest |sum|, above all of residuals; fp16 must be able to hold it
        self.max_products: dict[str, float] = {}  # by matrix: the largest |x| it takes or gives
        # Keys and values of the last layer of each kind that has its own: what shared layers read.
        self.lent: dict[AttentionKind, tuple[Tensor, Tensor]] = {}

    def embed(self, table: Weight, scale: float) -> Tensor:
        rows = [table.rows(t, t + 1) for t in self._tokens.flatten().tolist()]
        x = torch.cat(rows).view(*self._tokens.shape, -1) * lookup_scale(table, scale)
        return x.to(self._tokens.device)

    def norm(self, x: Tensor, gain: Weight) -> Tensor:
        return rms_norm(x, _read_all(gain, x), self._epsilon)

    def head_norm(self, x: Tensor, gain: Weight, heads: int) -> Tensor:
        return self.norm(x.view(*x.shape[:-1], heads, -1), gain).flatten(-2)

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        products = [_matmul(x, weight) for weight in weights]
        for weight, y in zip(weights, products, strict=True):
            self.max_products[weight.name] = max(_largest(x), _largest(y))
        return products

    def value_norm(self, v: Tensor, layer: LayerSpec) -> Tensor:
        heads = v.view(*v.shape[:-1], layer.kv_heads, layer.head_dim)
        return functional.rms_norm(heads, heads.shape[-1:], eps=self._epsilon).flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        k = rotate(split_heads(k, layer.kv_heads), layer.rope)  # (B, K, T, D)
        v = split_heads(v, layer.kv_heads)
        if self._caches is not None:
            scales = self._caches[layer.index]
            k, v = round_cached(k, scales.keys), round_cached(v, scales.values)
        self.lent[layer.kind] = k, v
        return self.attend_shared(q, layer)

    def attend_shared(self, q: Tensor, layer: LayerSpec) -> Tensor:
        k, v = self.lent[layer.kind]
        q = rotate(split_heads(q, layer.heads), layer.rope, k.shape[-2])  # (B, H, N, D)
        return self._attend(q, k, v, layer).transpose(1, 2).flatten(-2)  # (B, N, H · D)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        """Attention (B, H, N, D) of the last N positions on all T."""
        mask = self._visible(k.shape[-2], layer.window, q.device)[-q.shape[-2] :]
        # One kv head at a time, because at 4096 tokens the scores of all heads are gigabytes.
        queries, keys, values = (x.chunk(layer.kv_heads, 1) for x in (q, k, v))
        heads = [
            _attend(*shared, layer, mask) for shared in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(heads, 1)

    def _visible(self, length: int, window: int | None, device: torch.device) -> Tensor:
        return visible(length, window, device)

    def add_norm(
        self, x: Tensor, branch: Tensor, post: Weight | None, then: Weight
    ) -> tuple[Tensor, Tensor]:
        x = self._watched(x + (branch if post is None else self.norm(branch, post)))
        return x, self.norm(x, then)

    def scaled_add_norm(
        self, x: Tensor, branch: Tensor, post: Weight, factor: Weight, then: Weight
    ) -> tuple[Tensor, Tensor]:
        x = self._watched(x + self.norm(branch, post))
        x = self._watched(x * _read_all(factor, x))
        return x, self.norm(x, then)

    def _watched(self, x: Tensor) -> Tensor:
        self.max_abs = max(self.max_abs, _largest(x))
        return x

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._watched(a + b)

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def columns(self, x: Tensor, part: int, parts: int) -> Tensor:
        return x.chunk(parts, -1)[part]

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.gelu(gate, approximate="tanh") * up

    def wanted(self, x: Tensor) -> Tensor:
        return x[:, -self._judged :]

    def logits(self, x: Tensor, head: Weight, softcap: float | None) -> Tensor:
        y = _matmul(x, head)
        self.max_products[head.name] = _largest(y)
        return soft_cap_(y, softcap)


class TorchEncoderOps(TorchOps):
    """Computes the vector of one text, (1, dimensions)."""

    def _visible(self, length: int, window: int | None, device: torch.device) -> Tensor:
        return near(length, window, device)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(1)

    def unit(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1)


def rotate(x: Tensor, rope: Rope, length: int | None = None) -> Tensor:
    """Apply rotary embedding to (B, heads, N, D); halves are paired as in Hugging Face's Gemma.

    These are the last N of `length` positions, by default all of them.
    """
    count, width = x.shape[-2:]
    end = length or count
    angle = torch.from_numpy(rope_angles(rope, range(end - count, end), width))  # (N, D / 2)
    cos, sin = angle.cos().float().to(x.device), angle.sin().float().to(x.device)
    return rotate_halves(x, cos, sin)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (…, T, D) by angles given as their cosines and sines, (T, D / 2)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), or x if there is no cap."""
    return x if cap is None else (x / cap).tanh() * cap


def soft_cap_(x: Tensor, cap: float | None) -> Tensor:
    """`soft_capped` in place."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)


def visible(length: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Causal mask, (T, T) bool: True if query row sees key column.

    The window includes the query's own position.
    """
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < (window or length))


def near(length: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """An encoder's mask, (T, T) bool: True if query row sees key column, before or behind it."""
    position = torch.arange(length, device=device)
    return (position[:, None] - position).abs() < (window or length)


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec, mask: Tensor) -> Tensor:
    """Attention of queries (B, G, N, D) on their shared key and value (B, 1, T, D)."""
    scores = q @ k.transpose(-1, -2) * layer.scale  # (B, G, N, T)
    scores = soft_cap_(scores, layer.softcap)
    return scores.masked_fill_(~mask, float("-inf")).softmax(-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)  # (B, heads, T, D)


def _largest(x: Tensor) -> float:
    """max |x|, without a copy of x."""
    low, high = torch.aminmax(x.detach())
    return max(-float(low), float(high))


def _read_all(weight: Weight, x: Tensor) -> Tensor:
    """A weight, where x is."""
    return weight.rows(0, weight.shape[0]).to(x.device)


def _matmul(x: Tensor, weight: Weight) -> Tensor:
    """x · wᵀ, with blocks of w's rows distributed to the cores."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))

    def multiply(span: tuple[int, int]) -> None:
        start, stop = span
        with torch.inference_mode():  # a thread has its own mode
            y[..., start:stop] = x @ weight.rows(start, stop).to(x.device).T

    for _ in in_order(multiply, row_blocks(weight.shape)):
        pass
    return y
