"""compressed-tensors: matrices as llm-compressor writes them (`pack-quantized`).

`weight_packed` (N, K · bits / 32) int32: words with the earlier code in the lower bits, offset by
2^(bits-1), so their bytes are the store's. `weight_scale` is (N, G) float16, `weight_shape` is N
and K. Source: compressed-tensors `compressors/pack_quantized`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from gemma_export.formats.format import Format
from gemma_export.model.config import HEAD
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.hf.weights import LOOKED_UP, Packing, Part
from gemma_runtime.formats.safetensors import TensorInfo


def _parts(weight: StoredWeight) -> dict[str, Part]:
    name, fmt, (rows, width) = weight.name, weight.format, weight.shape
    words = TensorInfo("I32", (rows, width * fmt.bits // 32))
    scales = TensorInfo("F16", (rows, width // fmt.group))
    shape = torch.tensor(weight.shape)
    return {
        f"{name}_packed": Part(words, partial(weight.part, "codes")),
        f"{name}_scale": Part(scales, partial(weight.part, "scales")),
        f"{name}_shape": Part(TensorInfo("I64", (2,)), lambda start, stop: shape[start:stop]),
    }


def _config(formats: Mapping[str, Format]) -> dict[str, Any] | None:
    """The `quantization_config`; None if every linear layer is float.

    Groups list the names of their layers if there are several formats.
    """
    linear = {
        name.removesuffix(".weight"): fmt for name, fmt in formats.items() if name not in LOOKED_UP
    }
    quantized = {name: fmt for name, fmt in linear.items() if not fmt.is_float}
    if not quantized:
        return None
    found = list(dict.fromkeys(quantized.values()))
    groups = {
        f"group_{index}": {
            "targets": ["Linear"]
            if len(found) == 1
            else [name for name, own in quantized.items() if own == fmt],
            "weights": _weights(fmt),
            "input_activations": None,
            "output_activations": None,
        }
        for index, fmt in enumerate(found)
    }
    head = [] if HEAD in formats else ["lm_head"]  # tied: the table, which is float
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*head, *(name for name in linear if name not in quantized)],
        "kv_cache_scheme": None,
    }


def _weights(fmt: Format) -> dict[str, Any]:
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if fmt.per_channel else "group",
        "group_size": None if fmt.per_channel else fmt.group,
        "dynamic": False,
    }


COMPRESSED = Packing(_parts, _config, ("transformers", "compressed-tensors"))
