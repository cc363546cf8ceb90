"""Rounds a table whose first channels are int8 and whose other channels are int4.

The int4 channels are rounded first; the int8 channels compensate their errors. An int8 step is a
sixteenth of an int4 step, so nearly the whole compensation survives rounding.

N rows, M channels, F of them int8, R = M - F int4.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_export.computing import in_float64
from gemma_export.formats.codes import Codes, dequantize
from gemma_export.formats.format import INT8, INT8_PIECE, Format
from gemma_export.quantize.calibrate.arrange import TABLE_DAMPING
from gemma_export.quantize.calibrate.gptq import REFINED, Inputs, gptq, prepare
from gemma_export.quantize.round import check_reach
from gemma_export.quantize.store import named_parts


@dataclass(frozen=True, slots=True)
class TableInputs:
    """Statistics for rounding a table or head, computed once and used for every block of rows."""

    name: str
    fmt: Format
    rest: Inputs  # (R, R) cost of int4 errors after the int8 channels compensated
    int8: Inputs | None = None  # (F, F) cost of int8 errors
    paid: Tensor | None = None  # (R, F) compensation in the int8 channels per int4 error

    def round(self, rows: Tensor) -> dict[str, Tensor]:
        """Quantize (N, M) rows; returns their parts by the names that the store uses."""
        check_reach(self.name, rows, self.fmt)
        parts: dict[str, Tensor] = {}
        for name, _, codes in self._pieces(rows, REFINED):
            parts |= named_parts(name, codes)
        return parts

    def rounded(self, rows: Tensor) -> Tensor:
        """(N, M) rows after quantization without refinement, dequantized."""
        return torch.cat([dequantize(codes, fmt) for _, fmt, codes in self._pieces(rows, 0)], 1)

    def _pieces(self, rows: Tensor, refined: int) -> list[tuple[str, Format, Codes]]:
        """Name, format and codes of each piece, from left to right."""
        first = self.fmt.int8_columns
        fmt = replace(self.fmt, int8_columns=0)
        codes = gptq(rows[:, first:], self.rest, fmt, refined)
        rest = (self.name, fmt, codes)
        if self.int8 is None or self.paid is None:
            return [rest]
        target = rows[:, :first] - (dequantize(codes, fmt) - rows[:, first:]) @ self.paid
        return [(self.name + INT8_PIECE, INT8, gptq(target, self.int8, INT8, refined)), rest]


def prepare_table(name: str, curvature: Tensor, fmt: Format) -> TableInputs:
    """From the curvature (M, M) of a row's error, channels in the table's order."""
    first = fmt.int8_columns
    if not first:
        return TableInputs(name, fmt, prepare(curvature, TABLE_DAMPING))
    square = in_float64(curvature)
    square.diagonal().add_(TABLE_DAMPING * square.diagonal().mean())
    corner, side = square[:first, :first], square[:first, first:]
    paid = torch.linalg.solve(corner, side)  # (F, R)
    rest = (square[first:, first:] - side.T @ paid).float().to(curvature.device)
    paid = paid.T.float().to(curvature.device)
    own = prepare(curvature[:first, :first], TABLE_DAMPING)
    return TableInputs(name, fmt, prepare((rest + rest.T) / 2, TABLE_DAMPING), own, paid)
