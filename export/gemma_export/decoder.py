"""Gemma, once. Every target is an implementation of `Ops` that this function drives."""

from collections.abc import Callable
from typing import TypeVar

from gemma_export.config import GemmaConfig
from gemma_export.ops import Ops, Weight

V = TypeVar("V")
W = TypeVar("W", bound=Weight)


def decoder(ops: Ops[V, W], config: GemmaConfig, weight: Callable[[str], W]) -> V:
    """Tokens to logits. `weight` finds a weight by its Hugging Face name."""

    def layer_weight(index: int, name: str) -> W:
        return weight(f"model.layers.{index}.{name}.weight")

    def norm_after(index: int) -> W:
        if index + 1 == len(config.kinds):
            return weight("model.norm.weight")
        return layer_weight(index + 1, "input_layernorm")

    table = weight("model.embed_tokens.weight")
    x = ops.embed(table, config.embed_scale)
    h = ops.norm(x, layer_weight(0, "input_layernorm"))
    for layer in config.layers:
        i = layer.index
        q, k, v = ops.project(h, [layer_weight(i, f"self_attn.{n}_proj") for n in "qkv"])
        if config.qk_norm:
            q = ops.head_norm(q, layer_weight(i, "self_attn.q_norm"), layer.heads)
            k = ops.head_norm(k, layer_weight(i, "self_attn.k_norm"), layer.kv_heads)
        attended = ops.attend(q, k, v, layer)
        if i + 1 == len(config.kinds):  # no later layer needs the other positions
            x, attended = ops.wanted(x), ops.wanted(attended)
        (branch,) = ops.project(attended, [layer_weight(i, "self_attn.o_proj")])
        post = layer_weight(i, "post_attention_layernorm")
        x, h = ops.add_norm(x, branch, post, layer_weight(i, "pre_feedforward_layernorm"))
        gate, up = ops.project(h, [layer_weight(i, f"mlp.{n}_proj") for n in ("gate", "up")])
        (branch,) = ops.project(ops.geglu(gate, up), [layer_weight(i, "mlp.down_proj")])
        post = layer_weight(i, "post_feedforward_layernorm")
        x, h = ops.add_norm(x, branch, post, norm_after(i))
    return ops.logits(h, table, config.final_softcap)
