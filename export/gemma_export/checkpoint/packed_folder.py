"""Finds the packed matrices of a folder, by its `quantization_config`."""

from collections.abc import Callable, Mapping
from typing import Any

from gemma_export.checkpoint.packed import (
    Holder,
    PackedMatrix,
    Places,
    awq_matrix,
    bitsandbytes_matrix,
    gptq_matrix,
)
from gemma_runtime.errors import ConfigError

METHODS: Mapping[str, Callable[[Places, Mapping[str, Any], Holder], PackedMatrix]] = {
    "gptq": gptq_matrix,
    "awq": awq_matrix,
    "bitsandbytes": bitsandbytes_matrix,
}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITSANDBYTES = ("SCB", "weight_format")


def split_packed(
    places: Places, hf_config: Mapping[str, Any]
) -> tuple[Places, dict[str, PackedMatrix], tuple[str, ...]]:
    """The plain tensors, the packed matrices by weight name, and notes for the user."""
    method = check_method(hf_config)
    if not method:
        return places, {}, ()
    config = _quantization(hf_config)
    modules: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        if (packed := _module(name, places)) is not None:
            module, part = packed
            modules.setdefault(module, {})[part] = place
    holder = Holder()
    matrices = {
        f"{module}.weight": METHODS[method](parts, config, holder)
        for module, parts in modules.items()
    }
    plain = {name: place for name, place in places.items() if _module(name, places) is None}
    return plain, matrices, _notes(method) if matrices else ()


def check_method(hf_config: Mapping[str, Any]) -> str:
    """The quantization method, "" if there is none. Raises ConfigError for an unsupported one."""
    config = _quantization(hf_config)
    if _is_mlx(hf_config.get("quantization")) or ("quant_method" not in config and _is_mlx(config)):
        raise ConfigError(
            "the weights are quantized by MLX, which is not supported; give the original "
            "checkpoint instead"
        )
    if not config:
        return ""
    method = str(config.get("quant_method"))
    if method not in METHODS:
        raise ConfigError(
            f"the weights are already quantized ({method}), expected one of {', '.join(METHODS)}; "
            "give the original checkpoint instead"
        )
    return method


def _quantization(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`quantization_config`, also of a multimodal model's text; empty if there is none."""
    text = hf_config.get("text_config")
    for config in (hf_config, text if isinstance(text, Mapping) else {}):
        if (found := config.get("quantization_config")) is not None:
            if not isinstance(found, Mapping):
                raise ConfigError(f"quantization_config is {found!r:.40}, expected an object")
            return found
    return {}


def _is_mlx(config: object) -> bool:
    return isinstance(config, Mapping) and {"bits", "group_size"} <= set(config)


def _module(name: str, places: Places) -> tuple[str, str] | None:
    """(module, part) if a tensor is part of a packed matrix, else None."""
    module, _, part = name.rpartition(".")
    if part in _PARTS and f"{module}.qweight" in places:
        return module, part
    module, _, part = name.partition(".weight")
    if part and f"{module}.weight.absmax" in places:
        return module, f"weight{part}"
    module, _, part = name.rpartition(".")
    has_scales = f"{module}.SCB" in places or f"{module}.weight.absmax" in places
    if part in ("weight", *_BITSANDBYTES) and has_scales:
        return module, part
    return None


def _notes(method: str) -> tuple[str, ...]:
    if method != "bitsandbytes":
        return ()
    return (
        "bitsandbytes weights are dequantized, because their format (nf4, or int8 per row) is not "
        "one of ours; every recipe except none rounds them again",
    )
