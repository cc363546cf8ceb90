"""The decoder of Gemma, written once. Every target implements the `Ops` that it calls.

Encoders, which give vectors, have the same layers: what differs is in their operations.
"""

from collections.abc import Callable
from typing import TypeVar

from gemma_export.model.config import (
    ATTENTION_OUT,
    DOWN,
    GATE_UP,
    HEAD,
    PER_LAYER_GATE,
    PER_LAYER_NORM,
    PER_LAYER_OUT,
    PER_LAYER_PROJECTION,
    PER_LAYER_TABLE,
    POST_NORMS,
    TABLE,
    GemmaConfig,
    LayerSpec,
    dense_layer,
    layer_scalar,
)
from gemma_export.model.families import MLP_NORM
from gemma_export.model.ops import EncoderOps, LayerOps, Ops, Weight

V = TypeVar("V")
W = TypeVar("W", bound=Weight)


def decoder(ops: Ops[V, W], config: GemmaConfig, weight: Callable[[str], W]) -> V:
    """Compute logits from tokens. `weight` returns a weight by its Hugging Face name."""
    table = weight(TABLE)
    head = table if config.tied else weight(HEAD)
    return ops.logits(_hidden_states(ops, config, weight, table), head, config.final_softcap)


def encoder(ops: EncoderOps[V, W], config: GemmaConfig, weight: Callable[[str], W]) -> V:
    """Compute the vector of a text, (1, dimensions), of length 1."""
    x = ops.mean(_hidden_states(ops, config, weight, weight(TABLE)))
    for index in range(len(config.dense)):
        (x,) = ops.project(x, [weight(dense_layer(index))])
    return ops.unit(x)


def _hidden_states(
    ops: LayerOps[V, W], config: GemmaConfig, weight: Callable[[str], W], table: W
) -> V:
    """What the last norm gives at the wanted positions, (B, N, M)."""
    x = ops.embed(table, config.embed_scale)
    parts = per_layer_parts(ops, config, weight, x) if config.per_layer else None
    h = ops.norm(x, weight(norm_before(config, 0)))
    for layer in config.layers:
        if parts is not None and layer.index == config.last_owner:
            parts = ops.wanted(parts)
        part = None if parts is None else ops.columns(parts, layer.index, len(config.kinds))
        x, h = decoder_layer(ops, config, layer, weight, x, h, part)
    return h


def per_layer_parts(
    ops: LayerOps[V, W], config: GemmaConfig, weight: Callable[[str], W], x: V
) -> V:
    """The per-layer embeddings of all layers, (B, T, layers · P), from the embeddings x."""
    (y,) = ops.project(x, [weight(PER_LAYER_PROJECTION)])
    y = ops.scaled(y, config.hidden_size**-0.5)
    y = ops.head_norm(y, weight(PER_LAYER_NORM), len(config.kinds))
    if not config.per_layer_table:
        return y
    looked_up = ops.embed(weight(PER_LAYER_TABLE), config.per_layer_scale)
    return ops.scaled(ops.add(y, looked_up), 2**-0.5)


def decoder_layer(
    ops: LayerOps[V, W],
    config: GemmaConfig,
    layer: LayerSpec,
    weight: Callable[[str], W],
    x: V,
    h: V,
    part: V | None = None,
) -> tuple[V, V]:
    """Apply one layer to the residual x and its norm h; return both for the next layer or head.

    `part` is the layer's part of the per-layer embeddings, at the positions that are left behind
    the attention: from the last layer with a cache of its own on, the wanted ones.
    """

    def own(name: str) -> W:
        return weight(f"model.layers.{layer.index}.{name}.weight")

    attended = _attention(ops, config, layer, own, h)
    if layer.index == config.last_owner:
        x, attended = ops.wanted(x), ops.wanted(attended)
    (branch,) = ops.project(attended, [own(name) for name in ATTENTION_OUT])
    attention_norm, post = POST_NORMS
    norm = own(attention_norm) if config.post_norms else None
    x, h = ops.add_norm(x, branch, norm, own(MLP_NORM))
    gate, up = ops.project(h, [own(name) for name in GATE_UP])
    (branch,) = ops.project(ops.geglu(gate, up), [own(name) for name in DOWN])
    if part is not None:
        x = ops.add(x, ops.norm(branch, own(post)))
        branch = _per_layer_branch(ops, config, layer, own, x, part)
        post = "post_per_layer_input_norm"
    then = weight(norm_before(config, layer.index + 1))
    if config.layer_scalars:
        return ops.scaled_add_norm(x, branch, own(post), weight(layer_scalar(layer.index)), then)
    return ops.add_norm(x, branch, own(post) if config.post_norms else None, then)


def _attention(
    ops: LayerOps[V, W], config: GemmaConfig, layer: LayerSpec, own: Callable[[str], W], h: V
) -> V:
    q, *kv = ops.project(h, [own(name) for name in layer.qkv])
    if config.qk_norm:
        q = ops.head_norm(q, own("self_attn.q_norm"), layer.heads)
    if not layer.owns_cache:
        return ops.attend_shared(q, layer)
    k, v = kv[0], kv[-1]  # one and the same where values are keys
    if config.value_norm:
        v = ops.value_norm(v, layer)
    if config.qk_norm:
        k = ops.head_norm(k, own("self_attn.k_norm"), layer.kv_heads)
    return ops.attend(q, k, v, layer)


def _per_layer_branch(
    ops: LayerOps[V, W],
    config: GemmaConfig,
    layer: LayerSpec,
    own: Callable[[str], W],
    x: V,
    part: V,
) -> V:
    """The layer's part of the per-layer embeddings, gated by the residual itself, not its norm."""
    (gate,) = ops.project(x, [own(name) for name in PER_LAYER_GATE])
    (branch,) = ops.project(ops.geglu(gate, part), [own(name) for name in PER_LAYER_OUT])
    return branch


def norm_before(config: GemmaConfig, index: int) -> str:
    """Name of the norm gain before a layer; for the index after the last, before the head."""
    if index == len(config.kinds):
        return "model.norm.weight"
    return f"model.layers.{index}.input_layernorm.weight"
