"""Int8 caches: keys and values rounded with one scale per channel.

A runtime rounds the keys after rope and the values when it writes them into the caches. Attention
then reads the rounded ones, also those of the chunk that is being written, so the result doesn't
depend on how tokens are cut into chunks.

Shapes: B batch, T tokens, K kv heads, D head size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LEAST, MOST = -128, 127


@dataclass(frozen=True, slots=True)
class LayerScales:
    """A layer's scales, none of them 0."""

    keys: Tensor  # (K, D) float32
    values: Tensor  # (K, D) float32


def round_cached(x: Tensor, scales: Tensor) -> Tensor:
    """Keys or values (B, K, T, D) as read back from an int8 cache with scales (K, D).

    Like onnxruntime, it rounds the product with the scale's inverse to the nearest even integer.
    """
    steps = scales[:, None].to(x.device)  # (K, 1, D)
    return (x * (1 / steps)).round_().clamp_(LEAST, MOST).mul_(steps)


def scales_digest(layers: Sequence[LayerScales]) -> str:
    """sha256 over all scales, keys before values."""
    digest = hashlib.sha256()
    for layer in layers:
        for scales in (layer.keys, layer.values):
            digest.update(scales.contiguous().numpy().tobytes())
    return digest.hexdigest()
