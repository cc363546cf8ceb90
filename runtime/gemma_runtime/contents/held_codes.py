"""Reads the quantized weights back from an artifact, whatever its container.

They come out in one layout: unsigned codes packed row by row, float16 scales, zero points packed
row by row. N rows, G groups per row.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from gemma_runtime.backend_table import BACKENDS, load_function
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.codes_gguf import read_gguf_codes
from gemma_runtime.contents.digests import combine_digests, parts_digest
from gemma_runtime.contents.gguf_names import hf_name
from gemma_runtime.contents.pte_file import open_pte
from gemma_runtime.embedding_bundle import EmbeddingBundle, EmbeddingManifest
from gemma_runtime.errors import BundleError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.formats.protobuf import ProtoMessage
from gemma_runtime.formats.safetensors import read_safetensors_header
from gemma_runtime.manifest import Manifest
from gemma_runtime.mil.blob import Nibbles
from gemma_runtime.mil.model import Constant, Operation
from gemma_runtime.mil.package import MilValue, Package

Bytes: TypeAlias = NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

_BLOCK = 16 << 20  # bytes hashed at a time
_ROWS = 1024  # of a table, divided by their scales at a time


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """A weight as views of the file. XOR the codes with `flip` to get ours."""

    name: str
    codes: Bytes
    scales: NDArray[np.float16]
    zeros: Bytes | None
    flip: int = 0


def codes_digest(bundle: Bundle | EmbeddingBundle) -> str | None:
    """Compute the manifest's `codes_digest` from the artifact.

    None if no weight is quantized or the container can't be read back. Raises BundleError for a
    missing weight or a damaged file.
    """
    formats = _quantized(bundle.manifest)
    backend = BACKENDS.get(bundle.manifest.target.name)
    if not formats or backend is None or backend.held_codes is None:
        return None
    reader: Callable[[Bundle | EmbeddingBundle], Iterator[HeldWeight]]
    reader = load_function(backend.held_codes)
    try:
        digests = {weight.name: _digest(weight) for weight in reader(bundle)}
    except (OSError, ValueError, KeyError, msgspec.DecodeError) as error:
        raise BundleError(f"{bundle.directory}: can't read the codes back: {error!r}") from error
    if missing := [name for name in formats if name not in digests]:
        raise BundleError(f"{bundle.directory} has no codes of {missing[0]}; export again")
    return combine_digests(f"{name} {form} {digests[name]}" for name, form in formats.items())


def _digest(weight: HeldWeight) -> str:
    codes = hashlib.sha256()
    for start in range(0, len(weight.codes), _BLOCK):
        block = weight.codes[start : start + _BLOCK]
        codes.update((block ^ np.uint8(weight.flip) if weight.flip else block).data)
    parts = [codes, hashlib.sha256(np.ascontiguousarray(weight.scales).data)]
    if weight.zeros is not None:
        parts.append(hashlib.sha256(np.ascontiguousarray(weight.zeros).data))
    return parts_digest(parts)


def _quantized(manifest: Manifest | EmbeddingManifest) -> dict[str, str]:
    tensors = manifest.quantization.tensors
    return {name: form for name, form in tensors.items() if form != "float32"}


def read_onnx(bundle: Bundle | EmbeddingBundle) -> Iterator[HeldWeight]:
    """Read initializers of the data file; their metadata name each weight's rows.

    Only files of the bundle are read, wherever the graph says that its data are.
    """
    graph = "decode" if isinstance(bundle, Bundle) else "encode"
    file = bundle.directory / bundle.manifest.graph(graph).file
    known = {bundle.directory / name for name in bundle.manifest.files}
    found: dict[str, dict[str, Bytes]] = {}
    for tensor in ProtoMessage(file.read_bytes()).message(7).messages(5):
        notes = {entry.text(1): entry.text(2) for entry in tensor.messages(_METADATA)}
        if "part" not in notes:
            continue
        total, *_ = tensor.numbers(_DIMS)
        whole = _external(file.parent, known, tensor).reshape(total, -1)
        spans = decode_json(notes["rows"], dict[str, tuple[int, int]])
        for name, (start, stop) in spans.items():
            found.setdefault(name, {})[notes["part"]] = whole[start:stop].ravel()
    for name, parts in found.items():
        scales = parts["scales"].view(np.float16)
        yield HeldWeight(name, parts["codes"], scales, parts.get("zeros"))


_DIMS, _EXTERNAL, _METADATA = 1, 13, 16  # fields of ONNX's TensorProto


def _external(folder: Path, known: set[Path], tensor: ProtoMessage) -> Bytes:
    """A tensor's data, which must be in one of the known files."""
    place = {entry.text(1): entry.text(2) for entry in tensor.messages(_EXTERNAL)}
    if folder / place["location"] not in known:
        raise ValueError(f"the data are in {place['location']!r:.80}, which is not in the manifest")
    offset, length = int(place["offset"]), int(place["length"])
    return np.memmap(folder / place["location"], np.uint8, "r", offset, (length,))


def read_executorch(bundle: Bundle) -> Iterator[HeldWeight]:
    """Read the delegates' named data. All scales are values that float16 holds.

    In 4 bits they are bfloat16, in 8 bits float32, and the codes are signed.
    """
    with open_pte(bundle.directory / bundle.manifest.graph("decode").file) as pte:
        for name, fmt in _quantized(bundle.manifest).items():
            codes = np.frombuffer(bytes(pte.named_data(f"{name}.codes")), np.uint8)
            stored = bytes(pte.named_data(f"{name}.scales"))
            if fmt.startswith("int8"):
                scales, flip = np.frombuffer(stored, np.float32), 0x80
            else:
                halves = np.frombuffer(stored, np.uint16)
                scales, flip = (halves.astype(np.uint32) << 16).view(np.float32), 0
            yield HeldWeight(name, codes, scales.astype(np.float16), None, flip)


# Role of a file with a table that the caller looks up → the table's name.
_TABLES = {
    "embedding": "model.embed_tokens.weight",
    "per_layer": "model.embed_tokens_per_layer.weight",
}


def read_coreml(bundle: Bundle) -> Iterator[HeldWeight]:
    """Read compressed constants, named like the weight with underscores for dots, and tables."""
    yield from _tables(bundle)
    names = {name.replace(".", "_"): name for name in _quantized(bundle.manifest)}
    for file in bundle.manifest.graph_files():
        package = Package((bundle.directory / file).parent)
        for operation in package.functions["decode"].operations():
            if operation.name in names and operation.kind == "constexpr_blockwise_shift_scale":
                yield _compressed(names[operation.name], package, operation)


def _tables(bundle: Bundle) -> Iterator[HeldWeight]:
    """The quantized tables in files of their own."""
    for role, name in _TABLES.items():
        if role in bundle.manifest.roles and name in _quantized(bundle.manifest):
            file = _Safetensors(bundle.path(role))
            codes, scales = file.read("codes", np.uint8), file.read("scales", np.float16)
            zeros = file.read("zeros", np.uint8) if "zeros" in file.tensors else None
            yield HeldWeight(name, codes.reshape(-1), scales, zeros)


def _compressed(name: str, package: Package, operation: Operation) -> HeldWeight:
    values = {
        key: package.value(binding)
        for key, (binding,) in operation.inputs.items()
        if isinstance(binding, Constant)
    }
    codes, flip = _packed(values["data"])
    scales = values["scale"]
    assert isinstance(scales, np.ndarray)
    zeros = _row_packed(values["offset"]) if "offset" in values else None
    return HeldWeight(name, codes, scales.view(np.float16), zeros, flip)


def _packed(value: MilValue) -> tuple[Bytes, int]:
    """The bytes of the codes, and the XOR mask that makes them unsigned."""
    if isinstance(value, Nibbles):
        return value.packed, 0x88 if value.signed else 0
    assert isinstance(value, np.ndarray)
    return value.view(np.uint8).reshape(-1), 0x80 if value.dtype == np.int8 else 0


def _row_packed(zeros: MilValue) -> Bytes:
    """Repack zero points so that each row starts at a byte; Core ML's rows do not."""
    if not isinstance(zeros, Nibbles) or zeros.shape[1] % 2 == 0:
        return _packed(zeros)[0]
    return _pack(zeros.unpack().view(np.uint8), 4)


def read_gguf(bundle: Bundle) -> Iterator[HeldWeight]:
    """Read blocks of 32 weights; a minimum is -scale · zero. Longer groups repeat their scale."""
    formats = _quantized(bundle.manifest)
    for matrix in read_gguf_codes(bundle.directory / bundle.manifest.graph("decode").file):
        name, zeros = hf_name(matrix.name), None
        blocks = _blocks_per_group(formats.get(name, ""), matrix.scales.shape[1])
        if matrix.minima is not None:
            found = -matrix.minima.astype(np.float32) / matrix.scales.astype(np.float32)
            zeros = _pack(_once(np.rint(found).astype(np.uint8), blocks), matrix.bits)
        codes = _pack(matrix.codes, matrix.bits)
        yield HeldWeight(name, codes, _once(matrix.scales, blocks), zeros)


def _blocks_per_group(form: str, blocks: int) -> int:
    """How many of a row's blocks of 32 share a scale in a format like `int4-g128`."""
    if "-channel" in form:
        return blocks
    group = re.search(r"-g(\d+)", form)
    return int(group[1]) // 32 if group else 1


def _once(values: NDArray[T], blocks: int) -> NDArray[T]:
    """Each group's value (N, G) from its blocks' (N, B); unchanged if a group's differ."""
    groups = values.reshape(len(values), -1, blocks)
    return groups[..., 0] if (groups == groups[..., :1]).all() else values


def read_hf(bundle: Bundle) -> Iterator[HeldWeight]:
    """Read packed words, whose bytes are ours or the transpose, and the table's floats."""
    model = _Safetensors(bundle.directory / bundle.manifest.graph("decode").file)
    for name, form in _quantized(bundle.manifest).items():
        if name in model.tensors:
            table = _Safetensors(bundle.path("table_scales"))
            yield _table_codes(name, form, model, table)
        elif (module := name.removesuffix(".weight")) + ".qweight" in model.tensors:
            yield _gptq_codes(name, module, form, model)
        else:
            codes = model.read(f"{name}_packed", np.uint8).reshape(-1)
            yield HeldWeight(name, codes, model.read(f"{name}_scale", np.float16), None)


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.tensors, _ = read_safetensors_header(path)
        self._data = np.memmap(path, np.uint8, "r")

    def read(self, name: str, dtype: type[T]) -> NDArray[T]:
        """The rows of a tensor as numbers of this type: (N, …)."""
        info = self.tensors[name]
        raw = self._data[info.offset : info.offset + info.bytes]
        return raw.view(dtype).reshape(info.shape[0], -1)


def _gptq_codes(name: str, module: str, form: str, model: _Safetensors) -> HeldWeight:
    """Raises ValueError for other zero points or groups than those of a symmetric matrix."""
    words = model.read(f"{module}.qweight", np.int32)  # (K · bits / 32, N)
    scales = model.read(f"{module}.scales", np.float16)  # (G, N)
    order = model.read(f"{module}.g_idx", np.int32).reshape(-1)
    below_middle = 0x77 if form.startswith("int4") else 0x7F  # stored are zero points minus one
    if (model.read(f"{module}.qzeros", np.uint8) != below_middle).any():
        raise ValueError(f"{module}.qzeros has other zero points than a symmetric matrix")
    if (order != np.arange(len(order)) // (len(order) // len(scales))).any():
        raise ValueError(f"{module}.g_idx has groups out of order")
    codes = np.ascontiguousarray(words.T).view(np.uint8).reshape(-1)
    return HeldWeight(name, codes, np.ascontiguousarray(scales.T), None)


def _table_codes(name: str, form: str, model: _Safetensors, held: _Safetensors) -> HeldWeight:
    """Divide the float16 weights by their scales: the rounding is far below half a code."""
    bits = 4 if form.startswith("int4") else 8
    weights, scales = model.read(name, np.float16), held.read(name, np.float16)
    group = weights.shape[1] // scales.shape[1]
    blocks = []
    for start in range(0, len(weights), _ROWS):
        rows = slice(start, start + _ROWS)
        steps = scales[rows].astype(np.float32).repeat(group, 1)
        signed = np.divide(weights[rows], steps, out=np.zeros_like(steps), where=steps != 0)
        codes = np.rint(signed) + (1 << (bits - 1))
        blocks.append(_pack(codes.astype(np.uint8), bits))
    return HeldWeight(name, np.concatenate(blocks), scales, None)


def _pack(values: Bytes, bits: int) -> Bytes:
    """(N, K) codes, packed row by row."""
    if bits == 8:
        return values.reshape(-1)
    padded = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    pairs: Bytes = padded[:, ::2] | (padded[:, 1::2] << np.uint8(4))
    return pairs.reshape(-1)
