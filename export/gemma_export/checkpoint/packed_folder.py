"""Finds the packed matrices of a folder, by the quantization that its files declare.

READERS is the list of what can be read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gemma_export.checkpoint.packed import Holder, PackedMatrix, Parts, Places
from gemma_export.checkpoint.packed_bitsandbytes import bitsandbytes_matrix
from gemma_export.checkpoint.packed_compressed import BITS as COMPRESSED_BITS
from gemma_export.checkpoint.packed_compressed import check_compressed, compressed_matrix
from gemma_export.checkpoint.packed_fp8 import FLOAT8_NOTE, fp8_matrix
from gemma_export.checkpoint.packed_gptq import (
    AWQ_BITS,
    GPTQ_BITS,
    auto_round_matrix,
    awq_matrix,
    gptq_matrix,
)
from gemma_export.checkpoint.packed_mlx import BITS as MLX_BITS
from gemma_export.checkpoint.packed_mlx import mlx_matrix
from gemma_runtime.errors import CheckpointError, ConfigError
from gemma_runtime.formats.json_bytes import decode_json

Read = Callable[[Parts, Mapping[str, Any], Holder], PackedMatrix]
_WHOLE = r"qweight|qzeros|scales|g_idx"
_FLOAT8 = r"weight|weight_scale|weight_scale_inv"
_ANY = "any size, or per row"
_ACTIVATIONS = r"(input|output|activation|[qkv])_(scale|zero_point|global_scale)(_ub)?"


@dataclass(frozen=True, slots=True)
class Reader:
    """One kind of quantized folder, and in words what becomes of it."""

    name: str
    read: Read
    parts: str  # a pattern of the names of a matrix's tensors
    marks: tuple[str, ...]  # a module that has one of these is packed
    bits: tuple[int, ...]
    groups: str  # of inputs that share a scale
    kept: str  # what --quant source keeps exactly
    dequantized: str  # what is turned into floats, and rounded again by every recipe but none
    refused: str
    note: str = ""  # for the user


# By `quant_method`; MLX folders have no method, but `quantization`.
READERS: Mapping[str, Reader] = {
    "gptq": Reader(
        "GPTQ (AutoGPTQ, GPTQModel)",
        gptq_matrix,
        _WHOLE,
        ("qweight",),
        bits=GPTQ_BITS,
        groups=_ANY,
        kept="codes in ordered groups, with `dynamic` too",
        dequantized="`desc_act` with groups out of order; scales beyond float16",
        refused="2, 3 and other bits; layouts other than gptq and gptq_v2",
    ),
    "awq": Reader(
        "AWQ (AutoAWQ)",
        awq_matrix,
        _WHOLE,
        ("qweight",),
        bits=AWQ_BITS,
        groups=_ANY,
        kept="codes of the GEMM layout",
        dequantized="scales beyond float16",
        refused="the layouts GEMV, GEMV fast, Marlin and llm-awq",
    ),
    "auto-round": Reader(
        "auto-round",
        auto_round_matrix,
        _WHOLE,
        ("qweight",),
        bits=GPTQ_BITS,
        groups=_ANY,
        kept="as GPTQ or AWQ, by `packing_format`",
        dequantized="as GPTQ or AWQ",
        refused="other packings, e.g. MXFP4 and NVFP4",
    ),
    "compressed-tensors": Reader(
        "compressed-tensors (llm-compressor)",
        compressed_matrix,
        r"weight|weight_(packed|scale|shape|zero_point|g_idx)",
        ("weight_packed", "weight_scale"),
        bits=COMPRESSED_BITS,
        groups="any size, per row or per tensor",
        kept="W4A16, W8A16 and W8A8 codes, with and without zero points",
        dequantized="float8 weights; activation ordering by group; scales beyond float16",
        refused="NVFP4, MXFP4, sparse and Marlin formats; rotated weights (`transform_config`)",
    ),
    "bitsandbytes": Reader(
        "bitsandbytes",
        bitsandbytes_matrix,
        r"weight(\.[\w.]+)?|SCB|weight_format",
        ("SCB", "weight.absmax"),
        bits=(4, 8),
        groups="blocks of nf4 and fp4; int8 per row",
        kept="",
        dequantized="nf4, fp4 and int8",
        refused="",
        note="bitsandbytes weights are dequantized, because their format (nf4, or int8 per row) "
        "is not one of ours; every recipe except none rounds them again",
    ),
    "fp8": Reader(
        "fp8 (fine-grained float8)",
        fp8_matrix,
        _FLOAT8,
        ("weight_scale", "weight_scale_inv"),
        bits=(8,),
        groups="per tensor, row or block",
        kept="",
        dequantized="all",
        refused="",
        note=FLOAT8_NOTE,
    ),
    "fbgemm_fp8": Reader(
        "fbgemm fp8",
        fp8_matrix,
        _FLOAT8,
        ("weight_scale",),
        bits=(8,),
        groups="per row",
        kept="",
        dequantized="all",
        refused="",
        note=FLOAT8_NOTE,
    ),
    "mlx": Reader(
        "MLX (mlx-lm)",
        mlx_matrix,
        r"weight|scales|biases",
        ("scales",),
        bits=MLX_BITS,
        groups="any size",
        kept="codes whose biases are whole zero points, or within an eighth of a code: these are "
        "rounded",
        dequantized="other biases; scales beyond float16",
        refused="2, 3, 5 and 6 bits; the modes mxfp4, mxfp8 and nvfp4",
    ),
}  # fmt: skip
_OTHER_NAMES = {"intel/auto-round": "auto-round", "gptqmodel": "gptq"}
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # files of older tools


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantization that a folder declares."""

    method: str
    config: Mapping[str, Any]
    file: Path | None = None  # the file beside config.json that declares it


def find_quantization(folder: Path, hf_config: Mapping[str, Any]) -> Quantization | None:
    """The declared quantization, None without one. Raises ConfigError for an unsupported one."""
    text = hf_config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    config = hf_config.get("quantization_config") or inner
    own = hf_config.get("quantization") or config
    if isinstance(own, dict) and {"bits", "group_size"} <= set(own) and not _method(config):
        return Quantization("mlx", own)
    if not config:
        return _beside(folder)
    if not isinstance(config, dict):
        raise ConfigError(f"quantization_config is {config!r:.40}, expected an object")
    method = _method(config)
    if method not in READERS:
        raise ConfigError(
            f"the weights are already quantized ({method or 'no quant_method':.40}), expected one "
            f"of {', '.join(READERS)}; give the original checkpoint instead"
        )
    return Quantization(method, config)


def _method(config: object) -> str:
    """`quant_method` under the name that READERS has; "" if there is none."""
    named = str(config.get("quant_method") or "") if isinstance(config, dict) else ""
    return _OTHER_NAMES.get(named, named)


def _beside(folder: Path) -> Quantization | None:
    """Older tools wrote the quantization into a file of its own."""
    for name, method in BESIDE.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = decode_json(path.read_bytes(), object)
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not a JSON object")
        return Quantization(_OTHER_NAMES.get(str(config.get("quant_method")), method), config, path)
    return None


def split_packed(
    places: Places, found: Quantization | None
) -> tuple[Places, dict[str, PackedMatrix], tuple[str, ...]]:
    """The plain tensors, the packed matrices by weight name, and notes for the user."""
    if found is None:
        return places, {}, ()
    reader = READERS[found.method]
    notes: tuple[str, ...] = (reader.note,) if reader.note else ()
    if found.method == "compressed-tensors":
        notes += check_compressed(found.config)
    modules, plain = _modules(places, reader)
    holder = Holder()
    matrices = {
        f"{module}.weight": reader.read(Parts(_stored_name(parts), parts), found.config, holder)
        for module, parts in modules.items()
    }
    return plain, matrices, notes


def _modules(places: Places, reader: Reader) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The parts of each packed module, and the other tensors; activations' scales are dropped."""
    pattern = re.compile(rf"(.+)\.({reader.parts})")
    dropped = re.compile(rf"(.+)\.{_ACTIVATIONS}")
    modules: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for name, place in places.items():
        match = pattern.fullmatch(name)
        if match and any(f"{match[1]}.{mark}" in places for mark in reader.marks):
            modules.setdefault(match[1], {})[match[2]] = place
        elif not dropped.fullmatch(name):
            plain[name] = place
    return modules, plain


def _stored_name(parts: Places) -> str:
    """The module's name in the file, which the config's own patterns refer to."""
    part, (_, stored) = next(iter(parts.items()))
    return stored.removesuffix(f".{part}")
