"""Tiny Gemmas with random weights, built by transformers and saved as checkpoint folders.

Windows and softcaps are small, so that a decoder that ignores one is clearly wrong.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedModel,
    VaultGemmaConfig,
    VaultGemmaForCausalLM,
)

WINDOW = 16
_SHARED: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,  # its square root is irrational, so a wrongly rounded scale shows
    "intermediate_size": 160,
    "sliding_window": WINDOW,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",  # sdpa ignores the softcap
    "dtype": "float32",
}


@dataclass(frozen=True)
class Tiny:
    """A named kind of tiny model."""

    name: str
    config: Any
    model: type[PreTrainedModel]
    plain_gains: bool = False  # norms multiply by their weights, not by 1 + weight
    # Factor of the matrices that write the residual. Without norms behind them, it decides how much
    # of the residual the last layers are, and so how much a rounding error changes the logits.
    writing: float = 1.0

    def build(self) -> PreTrainedModel:
        """The model with random weights, also in the norms; the same on every call."""
        torch.manual_seed(7)
        model = self.model(self.config)
        model.train(False)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                spread = 0.3 if "norm" in name else 2 * weight.shape[-1] ** -0.5
                weight.copy_(torch.randn_like(weight) * spread)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(self.writing)
                if "norm" in name and self.plain_gains:
                    weight.mul_(0.7).add_(1)
                # Without a scale of attention, ordinary gains make the model chaotic: a change of
                # 1e-7 in a weight moves logits by 2e-2.
                if name.endswith(("q_norm.weight", "k_norm.weight")) and self.plain_gains:
                    weight.mul_(weight.shape[0] ** -0.25)
            for name, factor in model.named_buffers():
                if name.endswith("layer_scalar"):
                    factor.copy_(0.3 + torch.rand_like(factor))
        return model


GEMMA2 = Tiny(
    "gemma2",
    Gemma2Config(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **_SHARED,
    ),
    Gemma2ForCausalLM,
)
# Like the 27b: many small heads, together twice the model's width, and a query scale that is
# derived from hidden_size / heads, not from head_dim.
GEMMA2_27B = Tiny(
    "gemma2-27b",
    Gemma2Config(
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=16,
        query_pre_attn_scalar=128 // 16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **_SHARED,
    ),
    Gemma2ForCausalLM,
)
GEMMA3 = Tiny(
    "gemma3",
    Gemma3TextConfig(
        num_hidden_layers=7,  # five local layers and a global one, then one more local layer
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        **_SHARED,
    ),
    Gemma3ForCausalLM,
)
TINIES = (GEMMA2, GEMMA2_27B, GEMMA3)
# Without norms behind attention and MLP.
GEMMA1 = Tiny(
    "gemma1",
    GemmaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        **{name: value for name, value in _SHARED.items() if name != "sliding_window"},
    ),
    GemmaForCausalLM,
    writing=0.25,
)
VAULT = Tiny(
    "vaultgemma",
    VaultGemmaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **_SHARED,
    ),
    VaultGemmaForCausalLM,
    writing=0.25,
)
UNNORMED = (GEMMA1, VAULT)

_GEMMA4: dict[str, Any] = {
    **_SHARED,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "final_logit_softcapping": 3.0,
}
_EDGE = {**_GEMMA4, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 32}
_DENSE = {**_GEMMA4, "num_key_value_heads": 4, "num_global_key_value_heads": 1}
_L, _G = "sliding_attention", "full_attention"
# Two layers of each kind have caches; three local ones and a global one read them.
E2B = Tiny(
    "gemma4-e2b",
    Gemma4TextConfig(
        num_hidden_layers=8,
        layer_types=[_L, _G, _L, _G, _L, _L, _L, _G],
        num_key_value_heads=1,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        **_EDGE,
    ),
    Gemma4ForCausalLM,
    plain_gains=True,
)
E4B = Tiny(
    "gemma4-e4b",
    Gemma4TextConfig(num_hidden_layers=12, num_key_value_heads=2, num_kv_shared_layers=5, **_EDGE),
    Gemma4ForCausalLM,
    plain_gains=True,
)
DENSE = Tiny(
    "gemma4-31b",
    Gemma4TextConfig(
        num_hidden_layers=6, hidden_size_per_layer_input=0, attention_k_eq_v=True, **_DENSE
    ),
    Gemma4ForCausalLM,
    plain_gains=True,
)
UNIFIED = Tiny(
    "gemma4-12b",
    Gemma4UnifiedTextConfig(num_hidden_layers=6, attention_k_eq_v=True, **_DENSE),
    Gemma4UnifiedForCausalLM,
    plain_gains=True,
)
GEMMA4S = (E2B, E4B, DENSE, UNIFIED)


def _shortened(tiny: Tiny, kinds: str, shared: int = 0) -> Tiny:
    """The same model with fewer layers: L means a local layer, G a global one.

    The last `shared` of them read the caches of others.
    """
    config = copy.deepcopy(tiny.config)
    if not hasattr(config, "layer_types"):  # all are global
        config.num_hidden_layers = len(kinds)
        return replace(tiny, config=config)
    names = {"L": "sliding_attention", "G": "full_attention"}
    config.layer_types = [names[kind] for kind in kinds]
    config.num_hidden_layers = len(kinds)
    if shared:
        config.num_kv_shared_layers = shared
    return replace(tiny, config=config)


# For targets whose compilers take seconds per layer.
SHORT_GEMMA2 = _shortened(GEMMA2, "LG")
SHORT_GEMMA3 = _shortened(GEMMA3, "LGL")
SHORT_UNNORMED = (_shortened(GEMMA1, "GG"), _shortened(VAULT, "LG"))
SHORT_E2B = _shortened(E2B, "LGLG", shared=2)
SHORT_DENSE = _shortened(DENSE, "LG")


def with_head_scale(tiny: Tiny) -> Tiny:
    """A copy with queries scaled by the head size, the only scale that llama.cpp supports."""
    config = copy.deepcopy(tiny.config)
    config.query_pre_attn_scalar = config.head_dim
    return replace(tiny, config=config)


def untied(tiny: Tiny) -> Tiny:
    """The same model with a head apart from its embedding table."""
    config = copy.deepcopy(tiny.config)
    config.tie_word_embeddings = False
    return replace(tiny, name=f"{tiny.name}-untied", config=config)


def save_tiny(tiny: Tiny, folder: Path) -> PreTrainedModel:
    """Write the checkpoint folder, and return the model."""
    model = tiny.build()
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def eager_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The logits of transformers at every position: (T, V) float32."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits
