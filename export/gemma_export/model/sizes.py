"""The official checkpoints: hub ids, and the configs used for planning and random weights.

Sources: the `config.json` of each hub repository and google/gemma_pytorch `config.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_export.model.config import Family, GemmaConfig, config_from_hf
from gemma_runtime.errors import ConfigError, nearest_first


@dataclass(frozen=True, slots=True)
class Official:
    family: Family
    size: str
    hub_id: str
    hf_config: Mapping[str, Any]

    @property
    def config(self) -> GemmaConfig:
        return config_from_hf(self.hf_config)


def find_official(size: str, family: Family | None = None) -> Official:
    """The checkpoint of a `--size`, e.g. 2b. `27b` means Gemma 2's unless `family` is gemma3.

    Raises ConfigError with the known sizes, most similar first.
    """
    for official in OFFICIAL:
        if official.size == size.lower() and family in (None, official.family):
            return official
    sizes = list(dict.fromkeys(o.size for o in OFFICIAL if family in (None, o.family)))
    of = f" of {family}" if family else ""
    raise ConfigError(f"no size {size!r}{of}; there are: {nearest_first(size.lower(), sizes)}")


def _gemma2(size: str, **fields: int) -> Official:
    config = {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "eos_token_id": [1, 107],
        **fields,
    }
    return Official("gemma2", size, f"google/gemma-2-{size}-it", config)


def _gemma3(size: str, **fields: int) -> Official:
    small = size in ("270m", "1b")  # text only, short context, no rope scaling
    config = {
        "model_type": "gemma3_text",
        "vocab_size": 262144 if small else 262208,
        "head_dim": 256,
        "sliding_window": 512 if small else 1024,
        "max_position_embeddings": 32768 if small else 131072,
        "rope_scaling": None if small else {"rope_type": "linear", "factor": 8.0},
        "eos_token_id": [1, 106],
        **fields,
    }
    return Official("gemma3", size, f"google/gemma-3-{size}-it", config)


def _shape(layers: int, width: int, ffn: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# The 27b models scale queries by width / heads, not by the head size.
OFFICIAL: tuple[Official, ...] = (
    _gemma2("2b", **_shape(26, 2304, 9216, 8, 4)),
    _gemma2("9b", **_shape(42, 3584, 14336, 16, 8)),
    _gemma2("27b", **_shape(46, 4608, 36864, 32, 16), head_dim=128, query_pre_attn_scalar=144),
    _gemma3("270m", **_shape(18, 640, 2048, 4, 1)),
    _gemma3("1b", **_shape(26, 1152, 6912, 4, 1)),
    _gemma3("4b", **_shape(34, 2560, 10240, 8, 4)),
    _gemma3("12b", **_shape(48, 3840, 15360, 16, 8)),
    _gemma3("27b", **_shape(62, 5376, 21504, 32, 16), head_dim=128, query_pre_attn_scalar=168),
)
