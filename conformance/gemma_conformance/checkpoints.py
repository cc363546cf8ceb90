"""Tiny Gemmas with random weights, in which every known fault changes the logits.

M is the width, T the number of tokens, V the size of the vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemma_conformance.tokenizer import VOCABULARY

WINDOW = 16
LENGTH = 64  # four windows
_L, _G = "sliding_attention", "full_attention"
# A residual column that is the same for all tokens. Norms after attention and MLP keep out of it,
# and the MLP's gates read it, so that most gates are negative: there, GELU and its approximation
# by tanh differ by percents.
_CONSTANT = 0


@dataclass(frozen=True, slots=True)
class TinyCheckpoint:
    """A checkpoint as data: the arguments of a transformers config, and the type of the weights."""

    name: str
    family: str  # gemma2, gemma3 or gemma4
    settings: Mapping[str, Any]
    dtype: str = "float32"
    seed: int = 7
    about: str = ""

    @property
    def turn(self) -> tuple[str, str]:
        """How a turn of a chat begins and ends."""
        return ("<|turn>", "<turn|>") if self.family == "gemma4" else _TURNS

    def config(self) -> Any:
        import transformers

        name = {
            "gemma2": "Gemma2Config",
            "gemma3": "Gemma3TextConfig",
            "gemma4": "Gemma4TextConfig",
        }
        config = getattr(transformers, name[self.family])(**_SHARED, **self.settings)
        config._attn_implementation = "eager"
        return config

    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.family.capitalize() + "ForCausalLM")

    def tokens(self) -> list[int]:
        """The bos token and random ordinary tokens, (T,)."""
        draw = torch.Generator().manual_seed(self.seed)
        return [2, *torch.randint(24, VOCABULARY, (LENGTH - 1,), generator=draw).tolist()]


_TURNS = ("<start_of_turn>", "<end_of_turn>")
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,  # its square root rounded to bfloat16 is 0.2 % off
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "sliding_window": WINDOW,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}
_GEMMA2: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 6.0,
}
_GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "rope_parameters": {
        _G: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        _L: {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
_GEMMA4: dict[str, Any] = {"head_dim": 32, "global_head_dim": 64, "final_logit_softcapping": 6.0}
CHECKPOINTS = (
    TinyCheckpoint("gemma2", "gemma2", _GEMMA2, about="windows in even layers, both softcaps"),
    TinyCheckpoint(
        "gemma2-27b",
        "gemma2",
        {**_GEMMA2, "query_pre_attn_scalar": 160 // 4},
        about="queries scaled by width / heads, not by the head size",
    ),
    TinyCheckpoint(
        "gemma2-bf16", "gemma2", _GEMMA2, "bfloat16", about="bfloat16 weights, as published"
    ),
    TinyCheckpoint(
        "gemma3", "gemma3", _GEMMA3, about="five windows to one global layer, rope by kind"
    ),
    TinyCheckpoint(
        "gemma3-bf16", "gemma3", _GEMMA3, "bfloat16", about="bfloat16 weights, as published"
    ),
    TinyCheckpoint(
        "gemma4-e2b",
        "gemma4",
        {
            **_GEMMA4,
            "num_hidden_layers": 8,
            "layer_types": [_L, _G, _L, _G, _L, _L, _L, _G],
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
        },
        about="shared caches, per-layer embeddings, layer scalars, partial rope",
    ),
    TinyCheckpoint(
        "gemma4-31b",
        "gemma4",
        {
            **_GEMMA4,
            "num_hidden_layers": 6,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
        },
        about="values that are the keys in global layers, layer scalars, partial rope",
    ),
)


@torch.no_grad()
def build(checkpoint: TinyCheckpoint) -> Any:
    """The transformers model in float32, with weights that `checkpoint.dtype` stores exactly."""
    torch.manual_seed(checkpoint.seed)
    model = checkpoint.model_class()(checkpoint.config())
    model.train(False)
    one_plus = checkpoint.family != "gemma4"
    for name, weight in model.named_parameters():
        weight.copy_(_random(name, weight, one_plus))
    for name, factor in model.named_buffers():
        if name.endswith("layer_scalar"):
            factor.copy_(0.3 + torch.rand_like(factor))
    _make_gates_negative(model, one_plus)
    dtype = getattr(torch, checkpoint.dtype)
    for tensor in (*model.parameters(), *_scalars(model)):
        tensor.copy_(tensor.to(dtype).float())
    round_embedding_scales(model, dtype)
    return model


def round_embedding_scales(model: nn.Module, dtype: torch.dtype) -> None:
    """Round factors of embeddings to the type of the stored weights, as Google's code does."""
    for module in model.modules():
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, Tensor):
            scale.copy_(scale.to(dtype).float())


def _scalars(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]


def _random(name: str, weight: Tensor, one_plus: bool) -> Tensor:
    if "norm" not in name:
        spread: float = 2 * weight.shape[-1] ** -0.5
        return torch.randn_like(weight) * spread
    values = torch.randn_like(weight) * 0.3
    if one_plus:
        return values
    values = 1 + 0.7 * values
    # Gemma 4 doesn't scale its scores. With ordinary gains, rounding errors would grow large.
    is_head = name.endswith(("q_norm.weight", "k_norm.weight"))
    factor: float = weight.shape[0] ** -0.25 if is_head else 1.0
    return values * factor


def _make_gates_negative(model: Any, one_plus: bool) -> None:
    text = model.model
    # Smaller embeddings, or else each token would predict itself.
    text.embed_tokens.weight.mul_(0.3)
    text.embed_tokens.weight[:, _CONSTANT] = 0.15
    silent = -1.0 if one_plus else 0.0
    text.norm.weight.mul_(3).add_(2 if one_plus else 0)
    text.norm.weight[_CONSTANT] = silent
    for layer in text.layers:
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            getattr(layer, norm).weight[_CONSTANT] = silent
        if hasattr(layer, "post_per_layer_input_norm"):
            layer.post_per_layer_input_norm.weight[_CONSTANT] = silent
        layer.pre_feedforward_layernorm.weight[_CONSTANT] = silent + 1
        layer.mlp.gate_proj.weight.mul_(0.5)
        layer.mlp.gate_proj.weight[:, _CONSTANT] = -1.5
