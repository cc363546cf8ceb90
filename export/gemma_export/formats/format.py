"""How a matrix is stored: bits per code, scales per group, zero points."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix is held: `bits` per code, one fp16 scale per `group` along the input.

    weight = scale · (code - zero), zero = 2^(bits-1) unless asymmetric, then one code per group.
    The first inputs of a matrix may be held in 8 bits: where a few of them matter most, as channels
    of a table do.
    """

    bits: Literal[4, 8, 32]
    group: int = 32
    asymmetric: bool = False
    per_channel: bool = False  # one scale for a row, whose width `group` is, once that is known
    fine: int = 0  # how many leading inputs are int8, in groups of 32

    @property
    def is_float(self) -> bool:
        return self.bits == 32

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and zero points; of a matrix in one piece."""
        assert not self.fine
        if self.is_float:
            return 32.0
        return self.bits + (16 + (self.bits if self.asymmetric else 0)) / self.group

    def pieces(self, name: str, width: int) -> dict[str, tuple[slice, "Format"]]:
        """What a matrix is held in, from left to right: names, columns and formats."""
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
# The head at a fifth more speed than in groups of 32, and hardly worse beside an int4 body. In an
# int8 model it doubles the KL: ONNX Runtime rounds activations in the same groups as weights.
INT8_WIDE = Format(8, group=128)
FLOAT = Format(32)
