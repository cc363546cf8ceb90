"""Reads packed matrices of quantized Hugging Face folders: GPTQ, AWQ, bitsandbytes.

N rows (outputs), K inputs, G groups. GPTQ and AWQ store the transpose, packed into int32, so a
matrix must be unpacked as a whole; one unpacked matrix is kept at a time.
Sources: AutoGPTQ `qlinear_cuda.py`, AutoAWQ `packing_utils.py`, bitsandbytes `functional.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from gemma_export.checkpoint.prequantized import Stored
from gemma_export.formats.codes import Codes, pack
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_runtime.errors import ConfigError

Place = tuple[SafetensorsFile, str]  # file, stored name
Places = Mapping[str, Place]  # e.g. qweight → its place
_SMALLEST_GROUP = 16  # inputs; no kernel has less
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # for each of eight columns, its nibble


class PackedMatrix(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor: ...
    def stored(self) -> Stored: ...
    def codes(self, start: int, stop: int) -> Codes: ...


class Unpacked(NamedTuple):
    """An unpacked matrix: weight = scale · (code - zero)."""

    codes: Tensor  # (N, K) uint8
    scales: Tensor  # (N, G) as stored
    zeros: Tensor  # (N, G) int32
    group_of: Tensor  # (K,), the group of each input


@dataclass(frozen=True)
class IntMatrix:
    """A GPTQ or AWQ matrix."""

    kind: str
    bits: int
    shape: tuple[int, ...]
    unpack: Callable[[], Unpacked]
    holder: "Holder"

    def rows(self, start: int, stop: int) -> Tensor:
        unpacked = self.holder.get(self)
        zeros = unpacked.zeros[start:stop, unpacked.group_of]  # (N, K)
        scales = unpacked.scales[start:stop, unpacked.group_of].float()
        return (unpacked.codes[start:stop].float() - zeros) * scales

    def stored(self) -> Stored:
        return self._stored

    @cached_property
    def _stored(self) -> Stored:
        """Only ordered groups, float16 scales and zero points within the codes fit a format."""
        unpacked = self.holder.get(self)
        count = unpacked.scales.shape[1]
        group, rest = divmod(self.shape[1], count)
        in_order = torch.arange(self.shape[1]) // max(group, 1)
        if rest or not torch.equal(unpacked.group_of, in_order):
            return Stored(f"{self.kind} with desc_act (groups out of order)")
        if not torch.equal(unpacked.scales.half().float(), unpacked.scales.float()):
            return Stored(f"{self.kind} with scales beyond float16")
        if int(unpacked.zeros.max()) >= 1 << self.bits:
            return Stored(f"{self.kind} with a zero point of {int(unpacked.zeros.max())}")
        step = _kernel_group(group)
        if step < _SMALLEST_GROUP:
            return Stored(f"{self.kind} in groups of {group}")
        return Stored(self.kind, self._format(step, unpacked.zeros))

    def codes(self, start: int, stop: int) -> Codes:
        unpacked, fmt = self.holder.get(self), self._stored.format
        assert fmt is not None, self.kind
        count = self.shape[1] // fmt.group // unpacked.scales.shape[1]  # scales are repeated
        zeros = unpacked.zeros[start:stop].to(torch.uint8).repeat_interleave(count, 1)
        scales = unpacked.scales[start:stop].half().repeat_interleave(count, 1)
        return Codes(
            pack(unpacked.codes[start:stop].contiguous(), fmt.bits),
            scales.contiguous(),
            pack(zeros.contiguous(), fmt.bits) if fmt.asymmetric else None,
        )

    def _format(self, group: int, zeros: Tensor) -> Format:
        is_symmetric = bool((zeros == 1 << (self.bits - 1)).all())
        return Format(8 if self.bits == 8 else 4, group, not is_symmetric)


@dataclass
class Holder:
    """Caches the last unpacked matrix, because its rows are read in consecutive blocks."""

    _matrix: IntMatrix | None = None
    _unpacked: Unpacked | None = None
    _lock: Lock = field(default_factory=Lock)

    def get(self, matrix: IntMatrix) -> Unpacked:
        with self._lock:
            if self._unpacked is None or self._matrix is not matrix:
                self._unpacked = None
                self._unpacked, self._matrix = matrix.unpack(), matrix
            return self._unpacked


def gptq_matrix(places: Places, config: Mapping[str, Any], holder: Holder) -> IntMatrix:
    """`qweight` (K · bits / 32, N), `qzeros` (G, N · bits / 32), `scales` (G, N), `g_idx` (K,)."""
    bits = _bits(config, "bits", (4, 8))
    words, columns = _shape(places, "qweight")
    inputs = words * 32 // bits
    # The first version of the format stores zero - 1.
    shift = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def unpack() -> Unpacked:
        codes = _unpack(_read(places, "qweight").t(), bits)  # (N, K)
        zeros = _unpack(_read(places, "qzeros"), bits).t().int() + shift  # (N, G)
        scales = _read(places, "scales").t()  # (N, G)
        if "g_idx" in places:
            group_of = _read(places, "g_idx").long()
        else:
            group_of = torch.arange(inputs) // (inputs // scales.shape[1])
        return Unpacked(codes, scales, zeros, group_of)

    return IntMatrix(f"gptq int{bits}", bits, (columns, inputs), unpack, holder)


def awq_matrix(places: Places, config: Mapping[str, Any], holder: Holder) -> IntMatrix:
    """`qweight` (K, N / 8), `qzeros` (G, N / 8), `scales` (G, N); columns interleaved."""
    _bits(config, "bits", (4,))
    inputs, words = _shape(places, "qweight")

    def columns(part: str) -> Tensor:
        nibbles = _unpack(_read(places, part), 4).view(-1, words, 8)
        return nibbles[..., _AWQ_ORDER].flatten(1).t()  # (N, K) or (N, G)

    def unpack() -> Unpacked:
        scales = _read(places, "scales").t()
        group_of = torch.arange(inputs) // (inputs // scales.shape[1])
        return Unpacked(columns("qweight").contiguous(), scales, columns("qzeros").int(), group_of)

    return IntMatrix("awq int4", 4, (words * 8, inputs), unpack, holder)


@dataclass(frozen=True)
class BitsAndBytesMatrix:
    """nf4, fp4, or int8 per row. It fits none of our formats, so it is only dequantized."""

    kind: str
    shape: tuple[int, ...]
    places: Places
    state: Mapping[str, Any]

    def rows(self, start: int, stop: int) -> Tensor:
        if self.kind == "bitsandbytes int8":
            steps = _read(self.places, "weight", start, stop).float()
            scales = _read(self.places, "SCB", start, stop)
            return steps * (scales.float() / 127)[:, None]
        width = self.shape[1]
        packed = self._packed(start * width // 2, stop * width // 2)
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten().long()
        block = self.state["blocksize"]
        block_of = torch.arange(start * width, stop * width) // block
        values = _read(self.places, "weight.quant_map")[codes]
        return (values * self._scales()[block_of]).view(stop - start, width)

    def _packed(self, start: int, stop: int) -> Tensor:
        """Bytes [start, stop). `bnb_4bit_quant_storage` may hold several in one element."""
        file, stored = self.places["weight"]
        size = file.dtype(stored).itemsize
        first = start // size
        elements = _read(self.places, "weight", first, -(-stop // size))
        return elements.view(torch.uint8).flatten()[start - first * size : stop - first * size]

    def stored(self) -> Stored:
        return Stored(self.kind)

    def codes(self, start: int, stop: int) -> Codes:
        raise AssertionError(self.kind)

    def _scales(self) -> Tensor:
        """One scale per block, dequantized first if the scales are quantized too."""
        scales = _read(self.places, "weight.absmax")
        if "nested_blocksize" not in self.state:
            return scales
        outer = torch.arange(len(scales)) // self.state["nested_blocksize"]
        looked_up = _read(self.places, "weight.nested_quant_map")[scales.long()]
        nested = looked_up * _read(self.places, "weight.nested_absmax")[outer]
        return nested + float(self.state["nested_offset"])


def bitsandbytes_matrix(
    places: Places, config: Mapping[str, Any], holder: Holder
) -> BitsAndBytesMatrix:
    """4 bits: `weight` (N · K / 2, 1) and quant_state, JSON as bytes. 8 bits: `weight`, `SCB`."""
    if "SCB" in places:
        return BitsAndBytesMatrix("bitsandbytes int8", _shape(places, "weight"), places, {})
    part = next((name for name in places if "quant_state" in name), None)
    if part is None:
        raise ConfigError("bitsandbytes weights have no quant_state; save the model again")
    state = msgspec.json.decode(bytes(_read(places, part).tolist()))
    kind = f"bitsandbytes {state['quant_type']}"
    return BitsAndBytesMatrix(kind, tuple(state["shape"]), places, state)


def _kernel_group(group: int) -> int:
    """The largest power of two that divides a group, e.g. 256 of one group per row of 2304."""
    return group & -group


def _unpack(words: Tensor, bits: int) -> Tensor:
    """(…, W) int32 → (…, W · 32 / bits) uint8, low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def _read(places: Places, part: str, start: int = 0, stop: int | None = None) -> Tensor:
    file, stored = places[part]
    return file.rows(stored, start, file.tensors[stored].shape[0] if stop is None else stop)


def _shape(places: Places, part: str) -> tuple[int, ...]:
    file, stored = places[part]
    return file.tensors[stored].shape


def _bits(config: Mapping[str, Any], key: str, known: tuple[int, ...]) -> int:
    bits = config.get(key)
    if bits not in known:
        raise ConfigError(
            f"quantization_config: {key} is {bits!r:.40}, expected {' or '.join(map(str, known))}"
        )
    return int(bits)
