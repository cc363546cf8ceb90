"""The format of a quantized matrix: bits per code, group size, zero points."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeVar

T = TypeVar("T")

INT8_PIECE = ".fine"  # names the piece with the int8 columns; codes digests contain it


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix is stored: `bits` per code, one float16 scale per `group` of inputs.

    weight = scale · (code - zero). zero is 2^(bits-1), or one code per group if asymmetric. The
    first `int8_columns` columns may be int8: a few channels of the embedding table matter far more
    than others.
    """

    bits: Literal[4, 8, 32]
    group: int = 32
    asymmetric: bool = False
    per_channel: bool = False  # one scale per row; `group` becomes the row's width
    int8_columns: int = 0  # number of leading columns stored as int8 in groups of 32

    @property
    def is_float(self) -> bool:
        return self.bits == 32

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and zero points per weight. Only for a format in one piece."""
        assert not self.int8_columns
        if self.is_float:
            return 32.0
        return self.bits + (16 + (self.bits if self.asymmetric else 0)) / self.group

    def pieces(self, name: str, width: int) -> dict[str, tuple[slice, "Format"]]:
        """The stored pieces of a matrix from left to right: name → (columns, format)."""
        first = self.int8_columns
        rest = {name: (slice(first, width), replace(self, int8_columns=0))}
        return {name + INT8_PIECE: (slice(first), INT8), **rest} if first else rest

    def __str__(self) -> str:
        if self.is_float:
            return "float32"
        grouping = "channel" if self.per_channel else f"g{self.group}"
        kind = f"int{self.bits}-{grouping}" + ("-asym" if self.asymmetric else "")
        return f"{kind} after {self.int8_columns} columns in {INT8}" if self.int8_columns else kind


def stacks(weights: Iterable[T], format_of: Callable[[T], Format]) -> Iterator[list[T]]:
    """Neighbours of one format, which a target may store and multiply as one matrix."""
    for _, together in groupby(weights, key=format_of):
        yield list(together)


INT4 = Format(4)
INT4_ASYM = Format(4, asymmetric=True)
INT8 = Format(8)
# For the table beside an int4 body: a fifth faster than groups of 32 and hardly worse. In an int8
# model it doubles the KL, because ONNX Runtime rounds activations in the weights' groups.
INT8_WIDE = Format(8, group=128)
FLOAT = Format(32)
