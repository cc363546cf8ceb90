"""Reads, checks and writes the header of a safetensors file.

The format: 8 bytes of header length, a JSON header, the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gemma_runtime.formats.json_bytes import decode_json

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
# Every dtype of the format, so that a tensor that nobody reads is no reason to refuse a file.
_ITEM_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int = 0  # from the start of the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * _ITEM_BITS[self.dtype] // 8

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BITS[self.dtype] // 8


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, and the metadata; checks that the tensors fill the file.

    Raises ValueError with what to say about the file after its name, or OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(
                f"is not a complete safetensors file: the header claims {length} bytes, the file "
                f"has {size}"
            )
        text = file.read(length)
    try:
        header = decode_json(text, dict[str, dict[str, Any]])
        metadata = header.pop("__metadata__", {})
        tensors = {name: _info(name, entry, 8 + length) for name, entry in header.items()}
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"has a broken safetensors header: {error}") from error
    _check_spans(tensors, 8 + length, size)
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def lay_out(
    layout: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[dict[str, TensorInfo], bytes]:
    """Place tensors one after the other; returns them with their offsets, and the header."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, info in layout.items():
        span = [end, end + info.bytes]
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": span}
        end += info.bytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed, end = {}, start
    for name, info in layout.items():
        placed[name] = TensorInfo(info.dtype, info.shape, end)
        end += info.bytes
    return placed, len(text).to_bytes(8, "little") + text


def _info(name: str, entry: Mapping[str, Any], start: int) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in _ITEM_BITS:
        raise ValueError(f"tensor {name} is {dtype!s:.30}, expected one of {', '.join(_ITEM_BITS)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):  # bool is an int too
        raise ValueError(f"tensor {name} has shape {shape!r:.60} at {begin!r:.30}…{end!r:.30}")
    info = TensorInfo(dtype, shape, start + begin)
    if info.bytes != end - begin:
        raise ValueError(f"tensor {name} needs {info.bytes} bytes, its span has {end - begin}")
    return info


def _check_spans(tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Check that the tensors fill the file without holes or overlaps."""
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.bytes)):
        if info.offset != end:
            raise ValueError(f"has tensors that overlap or leave a hole at byte {end}")
        end += info.bytes
    if end != size:
        raise ValueError(f"has {size} bytes, its header describes {end}")
