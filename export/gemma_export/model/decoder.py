"""The decoder of Gemma, written once. Every target implements the `Ops` that it calls."""

from collections.abc import Callable
from typing import TypeVar

from gemma_export.model.config import (
    ATTENTION_OUT,
    DOWN,
    GATE_UP,
    HEAD,
    QKV,
    TABLE,
    GemmaConfig,
    LayerSpec,
)
from gemma_export.model.ops import Ops, Weight

V = TypeVar("V")
W = TypeVar("W", bound=Weight)


def decoder(ops: Ops[V, W], config: GemmaConfig, weight: Callable[[str], W]) -> V:
    """Compute logits from tokens. `weight` returns a weight by its Hugging Face name."""
    table = weight(TABLE)
    head = table if config.tied else weight(HEAD)
    x = ops.embed(table, config.embed_scale)
    h = ops.norm(x, weight(norm_before(config, 0)))
    for layer in config.layers:
        x, h = decoder_layer(ops, config, layer, weight, x, h)
    return ops.logits(h, head, config.final_softcap)


def decoder_layer(
    ops: Ops[V, W],
    config: GemmaConfig,
    layer: LayerSpec,
    weight: Callable[[str], W],
    x: V,
    h: V,
) -> tuple[V, V]:
    """Apply one layer to the residual x and its norm h; return both for the next layer or head."""

    def own(name: str) -> W:
        return weight(f"model.layers.{layer.index}.{name}.weight")

    q, k, v = ops.project(h, [own(name) for name in QKV])
    if config.qk_norm:
        q = ops.head_norm(q, own("self_attn.q_norm"), layer.heads)
        k = ops.head_norm(k, own("self_attn.k_norm"), layer.kv_heads)
    attended = ops.attend(q, k, v, layer)
    if layer.index + 1 == len(config.kinds):  # no later layer needs the other positions
        x, attended = ops.wanted(x), ops.wanted(attended)
    (branch,) = ops.project(attended, [own(name) for name in ATTENTION_OUT])
    post = own("post_attention_layernorm")
    x, h = ops.add_norm(x, branch, post, own("pre_feedforward_layernorm"))
    gate, up = ops.project(h, [own(name) for name in GATE_UP])
    (branch,) = ops.project(ops.geglu(gate, up), [own(name) for name in DOWN])
    post = own("post_feedforward_layernorm")
    return ops.add_norm(x, branch, post, weight(norm_before(config, layer.index + 1)))


def norm_before(config: GemmaConfig, index: int) -> str:
    """Name of the norm gain before a layer; for the index after the last, before the head."""
    if index == len(config.kinds):
        return "model.norm.weight"
    return f"model.layers.{index}.input_layernorm.weight"
