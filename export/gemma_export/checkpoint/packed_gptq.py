"""Reads GPTQ and AWQ matrices, and auto-round's, which are packed like them.

Both store the transpose, packed into int32. Sources: AutoGPTQ `qlinear_cuda.py`, GPTQModel
`quantization/config.py`, AutoAWQ `packing_utils.py`, auto-round `inference/backend.py`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gemma_export.checkpoint.packed import (
    FLOATS,
    INTEGERS,
    Holder,
    IntMatrix,
    Parts,
    Unpacked,
    checked_groups,
    ordered_groups,
    unpack_words,
)
from gemma_export.formats.patterns import matches
from gemma_runtime.errors import ConfigError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # for each of eight columns, its nibble
# The first version of the format stores zero - 1, the second the zero point itself.
GPTQ_BITS, AWQ_BITS = (4, 8), (4,)
_GPTQ_SHIFTS = {"gptq": 1, "gptq_v2": 0}
_AUTO_ROUND = {  # packing_format → GPTQ's name of it, or awq
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round:awq": "awq",
    "auto_round:auto_awq": "awq",
}


def gptq_matrix(parts: Parts, config: Mapping[str, Any], holder: Holder) -> IntMatrix:
    """`qweight` (K · bits / 32, N), `qzeros` (G, N · bits / 32), `scales` (G, N), `g_idx` (K,)."""
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    shift = _GPTQ_SHIFTS[_one_of(layout, "checkpoint_format", tuple(_GPTQ_SHIFTS))]
    bits = _bits(_module_config(parts.module, config), "bits", GPTQ_BITS)
    words, columns = parts.shape("qweight", ("I32",), 2)
    groups, _ = parts.shape("scales", FLOATS, 2)
    inputs = words * 32 // bits
    parts.check("scales", FLOATS, groups, columns)
    parts.check("qzeros", ("I32",), groups, columns * bits // 32)
    if "g_idx" in parts:
        parts.check("g_idx", INTEGERS, inputs)
    elif inputs % groups:
        raise parts.error("scales", f"a number of groups that divides {inputs} inputs")

    def unpack() -> Unpacked:
        codes = unpack_words(parts.read("qweight").t(), bits)  # (N, K)
        zeros = unpack_words(parts.read("qzeros"), bits).t().int() + shift  # (N, G)
        has_order = "g_idx" in parts
        order = checked_groups(parts, "g_idx", groups) if has_order else None
        group_of = ordered_groups(inputs, groups) if order is None else order
        return Unpacked(codes, parts.read("scales").t(), zeros, group_of)

    return IntMatrix(f"gptq int{bits}", bits, (columns, inputs), unpack, holder)


def awq_matrix(parts: Parts, config: Mapping[str, Any], holder: Holder) -> IntMatrix:
    """`qweight` (K, N / 8), `qzeros` (G, N / 8), `scales` (G, N); columns interleaved."""
    layout = str(config.get("version") or config.get("format") or "gemm").lower()
    _one_of(layout, "version", ("gemm",))
    _one_of(config.get("backend") or "autoawq", "backend", ("autoawq",))
    _bits(config, "bits" if "bits" in config else "w_bit", AWQ_BITS)
    inputs, words = parts.shape("qweight", ("I32",), 2)
    groups, _ = parts.shape("scales", FLOATS, 2)
    parts.check("scales", FLOATS, groups, words * 8)
    parts.check("qzeros", ("I32",), groups, words)
    if inputs % groups:
        raise parts.error("scales", f"a number of groups that divides {inputs} inputs")

    def columns(part: str) -> Tensor:
        nibbles = unpack_words(parts.read(part), 4).view(-1, words, 8)
        return nibbles[..., _AWQ_ORDER].flatten(1).t()  # (N, K) or (N, G)

    def unpack() -> Unpacked:
        codes, zeros = columns("qweight").contiguous(), columns("qzeros").int()
        return Unpacked(codes, parts.read("scales").t(), zeros, ordered_groups(inputs, groups))

    return IntMatrix("awq int4", 4, (words * 8, inputs), unpack, holder)


def auto_round_matrix(parts: Parts, config: Mapping[str, Any], holder: Holder) -> IntMatrix:
    """A GPTQ or AWQ matrix, by `packing_format`; `extra_config` has the bits of some modules."""
    named = config.get("packing_format", "auto_round:auto_gptq")
    layout = _AUTO_ROUND[_one_of(named, "packing_format", tuple(_AUTO_ROUND))]
    own = _dict(config.get("extra_config") or {}, "extra_config").get(parts.module, {})
    merged = {**config, **_dict(own, f"extra_config of {parts.module}")}
    if layout == "awq":
        return awq_matrix(parts, {"bits": merged.get("bits")}, holder)
    return gptq_matrix(parts, {"bits": merged.get("bits"), "checkpoint_format": layout}, holder)


def _module_config(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a module: the first pattern of GPTQModel's `dynamic` that matches, or all's.

    `+:PATTERN` or `PATTERN` overrides fields; `-:PATTERN` names modules that are not quantized.
    """
    for rule, fields in _dict(config.get("dynamic") or {}, "dynamic").items():
        sign, pattern = (rule[:1], rule[2:]) if rule[:2] in ("+:", "-:") else ("+", rule)
        try:
            is_meant = matches(pattern, module)
        except ValueError as error:
            raise ConfigError(
                f"quantization_config: dynamic has the pattern {pattern!r:.60}, which is not a "
                f"regular expression ({error})"
            ) from error
        if is_meant and sign == "-":
            raise ConfigError(
                f"quantization_config: dynamic excludes {module} ({rule!r:.60}), but its weights "
                "are packed; download the folder again"
            )
        if is_meant:
            return {**config, **_dict(fields, f"dynamic {rule!r:.60}")}
    return config


def _dict(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"quantization_config: {name} is {value!r:.40}, expected an object")
    return value


def _one_of(value: Any, key: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(
            f"quantization_config: {key} is {value!r:.40}, expected {' or '.join(known)}; give the "
            "original checkpoint instead"
        )
    return str(value)


def _bits(config: Mapping[str, Any], key: str, known: tuple[int, ...]) -> int:
    bits = config.get(key)
    if bits not in known:
        raise ConfigError(
            f"quantization_config: {key} is {bits!r:.40}, expected {' or '.join(map(str, known))}"
        )
    return int(bits)
