"""Reads compressed-tensors matrices, as llm-compressor writes them.

Source: compressed-tensors `compressors/pack_quantized` and `naive_quantized`.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from gemma_export.checkpoint.packed import (
    FLOATS,
    INTEGERS,
    Holder,
    IntMatrix,
    PackedMatrix,
    Parts,
    Unpacked,
    checked_groups,
    ordered_groups,
    unpack_words,
)
from gemma_export.checkpoint.packed_fp8 import FLOAT8, FLOAT8_NOTE, fp8_matrix
from gemma_runtime.errors import ConfigError

BITS = (4, 8)
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
_MIXED = "mixed-precision"  # each group has a format of its own
_NOT_SPARSE = ("dense", None)


def compressed_matrix(parts: Parts, config: Mapping[str, Any], holder: Holder) -> PackedMatrix:
    """A matrix whose stored tensors say what it is; the config must allow it."""
    if "weight_packed" in parts:
        return _packed_matrix(parts, config, holder)
    if parts.dtype("weight") in FLOAT8:
        return fp8_matrix(parts, {"weight_block_size": _block_structure(config)}, holder)
    return _int8_matrix(parts, holder)


def check_compressed(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes for the user. Raises ConfigError for what can't be read."""
    for form in _formats(config):
        if form not in _FORMATS:
            raise ConfigError(
                f"quantization_config: format is {form!r:.40}, expected one of "
                f"{', '.join(_FORMATS)}; give the original checkpoint instead"
            )
    if config.get("transform_config"):
        raise ConfigError(
            "quantization_config: transform_config rotates the weights, which is not supported; "
            "give the original checkpoint instead"
        )
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format") not in _NOT_SPARSE:
        raise ConfigError(
            f"quantization_config: sparsity_config has the format {sparsity['format']!r:.40}, "
            "expected dense; give the original checkpoint instead"
        )
    return _notes(config)


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    groups = list(_groups(config))
    weights = [group.get("weights") for group in groups]
    is_float8 = any(isinstance(w, dict) and w.get("type") == "float" for w in weights)
    notes: tuple[str, ...] = (FLOAT8_NOTE,) if is_float8 else ()
    if config.get("kv_cache_scheme") or any(group.get("input_activations") for group in groups):
        notes += (
            "the checkpoint's config also quantizes activations or the cache, which the export "
            "doesn't do",
        )
    return notes


def _formats(config: Mapping[str, Any]) -> set[str | None]:
    own = {_name(group.get("format")) for group in _groups(config)} - {None}
    named = _name(config.get("format"))
    return (own or {_MIXED}) if named == _MIXED else {named} | own


def _name(value: object) -> str | None:
    """A format's name; what is no text is the name of none."""
    return value if isinstance(value, str | None) else f"{value!r:.40}"


def _groups(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(
            f"quantization_config: config_groups is {groups!r:.40}, expected an object per group"
        )
    for group in groups.values():
        if isinstance(group, dict):
            yield group


def _packed_matrix(parts: Parts, config: Mapping[str, Any], holder: Holder) -> IntMatrix:
    """`weight_packed` (N, K · bits / 32), `weight_shape`, `weight_scale` (N, G)."""
    rows, words = parts.shape("weight_packed", ("I32",), 2)
    parts.check("weight_shape", INTEGERS, 2)
    shape = tuple(int(size) for size in parts.read("weight_shape"))
    inputs = shape[1]
    if inputs < 1:
        raise parts.error("weight_shape", f"a number of inputs, not {inputs}")
    declared = _declared_bits(config)
    bits = next((b for b in declared if (rows, -(-inputs * b // 32)) == (shape[0], words)), 0)
    if not bits:
        expected = f"{shape[0]} rows of {inputs} codes of {' or '.join(map(str, declared))} bits"
        raise parts.error("weight_packed", expected)
    groups = _group_count(parts, rows, inputs)
    _check_zeros(parts, rows, groups, bits)
    if "weight_g_idx" in parts:
        parts.check("weight_g_idx", INTEGERS, inputs)

    def unpack() -> Unpacked:
        codes = unpack_words(parts.read("weight_packed"), bits)[:, :inputs].contiguous()
        return Unpacked(
            codes, _scales(parts, rows, groups), _zeros(parts, rows, groups, bits),
            _group_of(parts, inputs, groups),
        )  # fmt: skip

    return IntMatrix(f"compressed-tensors int{bits}", bits, (rows, inputs), unpack, holder)


def _int8_matrix(parts: Parts, holder: Holder) -> IntMatrix:
    """`weight` (N, K) int8, whatever the number of bits, `weight_scale` and zero points alike."""
    rows, inputs = parts.shape("weight", ("I8",), 2)
    groups = _group_count(parts, rows, inputs)
    _check_zeros(parts, rows, groups, 8)

    def unpack() -> Unpacked:
        codes = (parts.read("weight").int() + 128).to(torch.uint8)
        return Unpacked(
            codes, _scales(parts, rows, groups), _zeros(parts, rows, groups, 8),
            ordered_groups(inputs, groups),
        )  # fmt: skip

    return IntMatrix("compressed-tensors int8", 8, (rows, inputs), unpack, holder)


def _declared_bits(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of bits of all groups."""
    weights = [group.get("weights") for group in _groups(config)]
    found = [w.get("num_bits") for w in weights if isinstance(w, dict) and w.get("type") != "float"]
    known = tuple(bits for bits in BITS if bits in found)
    if not known:
        raise ConfigError(
            f"quantization_config: num_bits is {' and '.join(map(str, found))[:40] or 'missing'}, "
            "expected 4 or 8; give the original checkpoint instead"
        )
    return known


def _block_structure(config: Mapping[str, Any]) -> Any:
    """The block of the first group with one, e.g. [128, 128]."""
    weights = [group.get("weights") for group in _groups(config)]
    found = [
        w["block_structure"] for w in weights if isinstance(w, dict) and "block_structure" in w
    ]
    return next((block for block in found if block), None)


def _group_count(parts: Parts, rows: int, inputs: int) -> int:
    """Groups per row: (N, G), (N,) per row, or one scale for the whole matrix."""
    shape = parts.shape("weight_scale", FLOATS)
    if prod(shape) == 1 or shape == (rows,):
        return 1
    if len(shape) != 2 or shape[0] != rows or inputs % shape[1]:
        raise parts.error("weight_scale", f"one scale per group of {rows} rows of {inputs} inputs")
    return shape[1]


def _check_zeros(parts: Parts, rows: int, groups: int, bits: int) -> None:
    if "weight_zero_point" not in parts:
        return
    if parts.dtype("weight_zero_point") == "I32":
        parts.check("weight_zero_point", ("I32",), -(-rows * bits // 32), groups)
    elif prod(parts.shape("weight_zero_point", ("I8",))) not in (1, rows * groups):
        raise parts.error("weight_zero_point", f"one zero point for each of {rows * groups} scales")


def _scales(parts: Parts, rows: int, groups: int) -> Tensor:
    scales = parts.read("weight_scale")
    return scales.reshape(-1, groups).expand(rows, groups)


def _zeros(parts: Parts, rows: int, groups: int, bits: int) -> Tensor:
    """(N, G) int32, as unsigned as the codes."""
    middle = 1 << (bits - 1)
    if "weight_zero_point" not in parts:
        return torch.full((rows, groups), middle, dtype=torch.int32)
    stored = parts.read("weight_zero_point")
    if stored.dtype is torch.int32:  # packed along the rows
        return unpack_words(stored.t(), bits)[:, :rows].t().int()
    return (stored.int() + middle).reshape(-1, groups).expand(rows, groups)


def _group_of(parts: Parts, inputs: int, groups: int) -> Tensor:
    """With activation ordering, `weight_g_idx` has each input's group; -1 stands for no order."""
    if "weight_g_idx" not in parts or bool((parts.read("weight_g_idx") == -1).all()):
        return ordered_groups(inputs, groups)
    return checked_groups(parts, "weight_g_idx", groups)
