"""The official sizes, as the `config.json` of each gives the shape of its text model.

Sources: the hub's repositories, google/gemma_pytorch `config.py`; of VaultGemma, which is gated,
copies of its file, whose weights are as many as the hub says.
"""

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]


def _shape(layers: int, width: int, ffn: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_GEMMA1: Json = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "eos_token_id": [1, 107],
}
_GEMMA2: Json = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "head_dim": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "eos_token_id": [1, 107],
}
_GEMMA3_SMALL: Json = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rope_scaling": None,
    "eos_token_id": [1, 106],
}
_GEMMA3: Json = {
    **_GEMMA3_SMALL,
    "vocab_size": 262208,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# The 27b models scale queries by width / heads, not by the head size.
_GEMMA2_27B = {"head_dim": 128, "query_pre_attn_scalar": 144}
_GEMMA3_27B = {"head_dim": 128, "query_pre_attn_scalar": 168}


def _layer_types(local: int, periods: int) -> list[str]:
    """That many local layers and a global one, repeated."""
    return [*["sliding_attention"] * local, "full_attention"] * periods


_GEMMA4: Json = {
    "model_type": "gemma4_text",
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
    "eos_token_id": [1, 106],
}
_GEMMA4_EDGE: Json = {
    **_GEMMA4,
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "hidden_size_per_layer_input": 256,
}
_GEMMA4_DENSE: Json = {
    **_GEMMA4,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
}

# Family → value of --size → config.json, smallest first.
SIZES: Mapping[str, Mapping[str, Json]] = {
    "gemma2": {
        "2b": {**_GEMMA2, **_shape(26, 2304, 9216, 8, 4)},
        "9b": {**_GEMMA2, **_shape(42, 3584, 14336, 16, 8)},
        "27b": {**_GEMMA2, **_shape(46, 4608, 36864, 32, 16), **_GEMMA2_27B},
    },
    "gemma3": {
        "270m": {**_GEMMA3_SMALL, **_shape(18, 640, 2048, 4, 1)},
        "1b": {**_GEMMA3_SMALL, **_shape(26, 1152, 6912, 4, 1)},
        "4b": {**_GEMMA3, **_shape(34, 2560, 10240, 8, 4)},
        "12b": {**_GEMMA3, **_shape(48, 3840, 15360, 16, 8)},
        "27b": {**_GEMMA3, **_shape(62, 5376, 21504, 32, 16), **_GEMMA3_27B},
    },
    "gemma4": {
        "e2b": {
            **_GEMMA4_EDGE,
            **_shape(35, 1536, 6144, 8, 1),
            "layer_types": _layer_types(4, 7),
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
        },
        "e4b": {
            **_GEMMA4_EDGE,
            **_shape(42, 2560, 10240, 8, 2),
            "num_kv_shared_layers": 18,
        },
        "12b": {
            **_GEMMA4_DENSE,
            **_shape(48, 3840, 15360, 16, 8),
            "model_type": "gemma4_unified_text",
            "num_global_key_value_heads": 1,
        },
        "31b": {
            **_GEMMA4_DENSE,
            **_shape(60, 5376, 21504, 32, 16),
            "num_global_key_value_heads": 4,
        },
    },
    "gemma": {
        "2b": {**_GEMMA1, **_shape(18, 2048, 16384, 8, 1)},
        "7b": {**_GEMMA1, **_shape(28, 3072, 24576, 16, 16)},
    },
    "vaultgemma": {
        "1b": {
            "model_type": "vaultgemma",
            "vocab_size": 256000,
            "head_dim": 256,
            "sliding_window": 512,
            "layer_types": ["full_attention"] * 26,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "max_position_embeddings": 1024,
            "eos_token_id": 1,
            **_shape(26, 1152, 6912, 4, 4),
        }
    },
    "embeddinggemma": {
        "300m": {
            **_GEMMA3_SMALL,
            **_shape(24, 768, 1152, 3, 1),
            "max_position_embeddings": 2048,
            "use_bidirectional_attention": True,
            "dense": [3072, 768],
        },
    },
    "embeddinggemma2": {
        "270m": {"model_type": "embedding_gemma2_text", **_shape(24, 512, 2048, 4, 2)},
    },
}
