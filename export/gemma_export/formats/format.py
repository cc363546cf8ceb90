"""The format of a quantized matrix: bits per code, group size, zero points."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix is stored: `bits` per code, one float16 scale per `group` of inputs.

    weight = scale · (code - zero). zero is 2^(bits-1), or one code per group if asymmetric. The
    first `fine` inputs may be int8: a few channels of the embedding table matter far more than
    others.
    """

    bits: Literal[4, 8, 32]
    group: int = 32
    asymmetric: bool = False
    per_channel: bool = False  # one scale per row; `group` becomes the row's width
    fine: int = 0  # number of leading inputs stored as int8 in groups of 32

    @property
    def is_float(self) -> bool:
        return self.bits == 32

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and zero points per weight. Only for a format in one piece."""
        assert not self.fine
        if self.is_float:
            return 32.0
        return self.bits + (16 + (self.bits if self.asymmetric else 0)) / self.group

    def pieces(self, name: str, width: int) -> dict[str, tuple[slice, "Format"]]:
        """The stored pieces of a matrix from left to right: name → (columns, format)."""
        rest = {name: (slice(self.fine, width), replace(self, fine=0))}
        return {f"{name}.fine": (slice(self.fine), INT8), **rest} if self.fine else rest

    def __str__(self) -> str:
        if self.is_float:
            return "float32"
        grouping = "channel" if self.per_channel else f"g{self.group}"
        kind = f"int{self.bits}-{grouping}" + ("-asym" if self.asymmetric else "")
        return f"{kind} after {self.fine} inputs in {INT8}" if self.fine else kind


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
