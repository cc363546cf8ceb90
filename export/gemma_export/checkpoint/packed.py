"""Packed matrices of quantized Hugging Face folders: what all kinds share.

N rows (outputs), K inputs, G groups. Most kinds must be unpacked as a whole, so one unpacked matrix
is kept at a time. Shapes and dtypes are checked when the folder is opened, values when read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gemma_export.checkpoint.prequantized import Stored
from gemma_export.formats.codes import Codes, pack
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_runtime.errors import CheckpointError

Place = tuple[SafetensorsFile, str]  # file, stored name
Places = Mapping[str, Place]  # e.g. qweight → its place
FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I32", "I64")
_SMALLEST_GROUP = 16  # inputs; no kernel has less
GROUPS = (
    "A group that is not a power of two, e.g. one per row, becomes smaller groups with the same "
    f"scale. If these have fewer than {_SMALLEST_GROUP} inputs, the matrix is dequantized."
)


class PackedMatrix(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor: ...
    def stored(self) -> Stored: ...
    def codes(self, start: int, stop: int) -> Codes: ...


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one packed matrix. Every access checks that the tensor is there."""

    module: str  # its stored name, e.g. model.layers.0.mlp.up_proj
    places: Places

    def __contains__(self, part: str) -> bool:
        return part in self.places

    def read(self, part: str, start: int = 0, stop: int | None = None) -> Tensor:
        file, stored = self._place(part)
        shape = file.tensors[stored].shape
        if not shape:
            return file.rows(stored, 0, 1)[0]
        return file.rows(stored, start, shape[0] if stop is None else stop)

    def dtype(self, part: str) -> str:
        file, stored = self._place(part)
        return file.tensors[stored].dtype

    def shape(self, part: str, dtypes: tuple[str, ...], rank: int | None = None) -> tuple[int, ...]:
        """The shape of a part; raises CheckpointError unless it has the dtype and the rank."""
        file, stored = self._place(part)
        info = file.tensors[stored]
        if info.dtype not in dtypes or (rank is not None and len(info.shape) != rank):
            expected = f"{' or '.join(dtypes)}" + (f" with {rank} dimensions" if rank else "")
            raise self.error(part, expected)
        if 0 in info.shape:
            raise self.error(part, "a tensor with elements")
        return info.shape

    def check(self, part: str, dtypes: tuple[str, ...], *shape: int) -> None:
        if self.shape(part, dtypes) != shape:
            raise self.error(part, f"{' or '.join(dtypes)} of shape {shape}")

    def error(self, part: str, expected: str) -> CheckpointError:
        file, stored = self._place(part)
        info = file.tensors[stored]
        return CheckpointError(
            f"{file.path}: tensor {stored} is {info.dtype} of shape {info.shape}, expected "
            f"{expected}; the file doesn't match its quantization config"
        )

    def _place(self, part: str) -> Place:
        if part not in self.places:
            file, stored = next(iter(self.places.values()))
            raise CheckpointError(
                f"{file.path}: tensor {self.module}.{part} is missing beside {stored}; download "
                "the folder again"
            )
        return self.places[part]


class Unpacked(NamedTuple):
    """An unpacked matrix: weight = scale · (code - zero)."""

    codes: Tensor  # (N, K) uint8
    scales: Tensor  # (N, G) as stored
    zeros: Tensor  # (N, G) int32
    group_of: Tensor  # (K,), the group of each input


@dataclass(frozen=True)
class IntMatrix:
    """A matrix of integer codes with scales and zero points."""

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
        low, high = (int(zero) for zero in torch.aminmax(unpacked.zeros))
        if low < 0 or high >= 1 << self.bits:
            return Stored(f"{self.kind} with a zero point of {low if low < 0 else high}")
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


def _kernel_group(group: int) -> int:
    """The largest power of two that divides a group, e.g. 256 of one group per row of 2304."""
    return group & -group


def ordered_groups(inputs: int, groups: int) -> Tensor:
    """The group of each input if the groups follow each other."""
    return torch.arange(inputs) // (inputs // groups)


def checked_groups(parts: Parts, part: str, groups: int) -> Tensor:
    """The stored group of each input (`g_idx`). Raises CheckpointError for an unknown group."""
    group_of = parts.read(part).long()
    low, high = (int(group) for group in torch.aminmax(group_of))
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{parts.module}.{part} names group {low if low < 0 else high}, expected 0 to "
            f"{groups - 1}; the file is damaged, download it again"
        )
    return group_of


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """(…, W) int32 → (…, W · 32 / bits) uint8, low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)
