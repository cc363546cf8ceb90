"""Reads matrices of MLX folders: weight = scale · code + bias, by groups along the input.

Source: `mx.quantize`, and mlx-lm's `quantization` in `config.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gemma_export.checkpoint.packed import FLOATS, Holder, Parts, unpack_words
from gemma_export.checkpoint.prequantized import Stored
from gemma_export.formats.codes import Codes, pack
from gemma_export.formats.format import Format
from gemma_runtime.errors import ConfigError

BITS = (4, 8)
# The largest part of a code that a bias may be off a whole zero point. MLX rounds biases to the
# scales' dtype, so few are whole.
_OFF = 1 / 8


@dataclass(frozen=True)
class MlxMatrix:
    bits: int
    group: int
    shape: tuple[int, ...]
    parts: Parts

    def rows(self, start: int, stop: int) -> Tensor:
        codes = self._read_codes(start, stop).float().view(stop - start, -1, self.group)
        scales = self.parts.read("scales", start, stop).float()[..., None]
        biases = self.parts.read("biases", start, stop).float()[..., None]
        return (codes * scales + biases).view(stop - start, -1)

    def stored(self) -> Stored:
        return self._stored

    @cached_property
    def _stored(self) -> Stored:
        """The codes are kept if the biases are whole zero points, or nearly so."""
        kind = f"mlx int{self.bits}"
        scales = self.parts.read("scales").float()
        if not torch.equal(scales.half().float(), scales):
            return Stored(f"{kind} with scales beyond float16")
        zeros = -self.parts.read("biases").float() / scales
        whole = zeros.round()
        in_range = bool(((whole >= 0) & (whole < 1 << self.bits)).all())
        if not in_range or not bool(((zeros - whole).abs() <= _OFF).all()):
            return Stored(f"{kind} with biases that are no zero points")
        fmt = Format(8 if self.bits == 8 else 4, self.group, asymmetric=True)
        exact = bool((whole * scales == -self.parts.read("biases").float()).all())
        return Stored(kind, fmt, "" if exact else "biases rounded to whole zero points")

    def codes(self, start: int, stop: int) -> Codes:
        scales = self.parts.read("scales", start, stop).float()
        zeros = (-self.parts.read("biases", start, stop).float() / scales).round()
        return Codes(
            pack(self._read_codes(start, stop), self.bits),
            scales.half(),
            pack(zeros.to(torch.uint8), self.bits),
        )

    def _read_codes(self, start: int, stop: int) -> Tensor:
        words = self.parts.read("weight", start, stop).view(torch.int32)
        return unpack_words(words, self.bits)


def mlx_matrix(parts: Parts, config: Mapping[str, Any], holder: Holder) -> MlxMatrix:
    """`weight` (N, K · bits / 32) uint32, `scales` and `biases` (N, G)."""
    own = config.get(parts.module)
    merged = {**config, **own} if isinstance(own, dict) else config
    mode, bits, group = merged.get("mode", "affine"), merged.get("bits"), merged.get("group_size")
    if mode != "affine" or bits not in BITS or not isinstance(group, int) or group < 1:
        raise ConfigError(
            f"quantization: {parts.module} has the mode {mode!r:.20}, bits {bits!r:.20} and "
            f"group_size {group!r:.20}, expected affine, 4 or 8 bits, and a group size; give the "
            "original checkpoint instead"
        )
    rows, groups = parts.shape("scales", FLOATS, 2)
    parts.check("biases", FLOATS, rows, groups)
    parts.check("weight", ("U32",), rows, groups * group * bits // 32)
    return MlxMatrix(bits, group, (rows, groups * group), parts)
