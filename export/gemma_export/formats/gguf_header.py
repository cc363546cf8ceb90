"""Writes GGUF headers, version 3: the inverse of `gguf_file.read_header`."""

import math
import struct
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from gemma_runtime.formats.gguf import ARRAY, NUMBERS, STRING, Value

ALIGNMENT = 32  # of every tensor, unless a key overrides it
_DTYPES: Mapping[str, int] = {np.dtype(name).name: kind for kind, name in NUMBERS.items()}

TensorType = tuple[tuple[int, ...], GGMLQuantizationType]  # shape, rows first


def write_header(
    file: BinaryIO, metadata: Mapping[str, Value], tensors: Mapping[str, TensorType]
) -> None:
    """Write keys, tensor infos and padding. The tensors must follow in this order, each padded."""
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_text(key) + _value(value))
    offset = 0
    for name, (shape, kind) in tensors.items():
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        file.write(_text(name) + dimensions + struct.pack("<IQ", kind, offset))
        offset += padded(tensor_bytes(shape, kind))
    file.write(bytes(-file.tell() % ALIGNMENT))


def tensor_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


def padded(length: int) -> int:
    return length + -length % ALIGNMENT


def _value(value: Value) -> bytes:
    """The type and the value. As llama.cpp expects, int becomes uint32, float becomes float32."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        counted = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return counted + b"".join(map(_text, value))
    if isinstance(value, np.ndarray):
        return _array(value)
    kind, code = ("bool", "?") if isinstance(value, bool) else ("uint32", "I")
    if isinstance(value, float):
        kind, code = "float32", "f"
    return struct.pack(f"<I{code}", _DTYPES[kind], value)


def _array(values: NDArray[np.generic]) -> bytes:
    little = values.astype(values.dtype.newbyteorder("<"))
    kind = _DTYPES[values.dtype.name]
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + little.tobytes()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
