"""llama.cpp's tensor names and Hugging Face's, in both directions."""

import re

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "layer_output_scale": "layer_scalar",
}
_WITHOUT_SUFFIX = ("layer_scalar",)  # Hugging Face's names that don't end in `.weight`
_STORED_NAMES = {ours: stored for stored, ours in _NAMES.items()}
_STORED_LAYER_NAMES = {ours: stored for stored, ours in _LAYER_NAMES.items()}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    match = re.fullmatch(r"model\.layers\.([0-9]+)\.([\w.]+?)(?:\.weight)?", name)
    if match:
        return f"blk.{match[1]}.{_STORED_LAYER_NAMES[match[2]]}.weight"
    return _STORED_NAMES[name]


def hf_name(stored: str) -> str:
    """Hugging Face's name of a llama.cpp tensor; an unknown name is returned unchanged."""
    match = re.fullmatch(r"blk\.([0-9]+)\.(\w+)\.weight", stored)
    if match and match[2] in _LAYER_NAMES:
        name = _LAYER_NAMES[match[2]]
        return f"model.layers.{match[1]}.{name}{'' if name in _WITHOUT_SUFFIX else '.weight'}"
    return _NAMES.get(stored, stored)
