"""A table whose first channels are held in 8 bits, rounded for what its errors cost.

The others are rounded first, with 4 bits, and the first ones pay for their errors as well as they
can: with steps a sixteenth as wide, they can pay nearly all that channels can pay for one another.

N rows, M channels, F fine ones, R = M - F others.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_export.formats.codes import Codes, dequantize
from gemma_export.formats.format import INT8, Format
from gemma_export.model.config import TABLE
from gemma_export.quantize.calibrate.arrange import TABLE_DAMPING
from gemma_export.quantize.calibrate.gptq import REFINED, Inputs, gptq, prepare
from gemma_export.quantize.store import named_parts


@dataclass(frozen=True, slots=True)
class TableInputs:
    """What rounding a table goes by; found once, for all blocks of rows."""

    form: Format
    rest: Inputs  # what errors of the others cost, once the fine channels have paid: (R, R)
    fine: Inputs | None = None  # what errors of the fine ones cost: (F, F)
    paid: Tensor | None = None  # (R, F) what fine channels pay for an error of each of the others

    def round(self, rows: Tensor) -> dict[str, Tensor]:
        """Codes of (N, M) rows by the names of their parts."""
        found: dict[str, Tensor] = {}
        for name, _, codes in self._pieces(rows, REFINED):
            found |= named_parts(name, codes)
        return found

    def rounded(self, rows: Tensor) -> Tensor:
        """(N, M): what their codes stand for, without the refinements."""
        return torch.cat([dequantize(codes, form) for _, form, codes in self._pieces(rows, 0)], 1)

    def _pieces(self, rows: Tensor, refined: int) -> list[tuple[str, Format, Codes]]:
        """From left to right."""
        fine = self.form.fine
        form = replace(self.form, fine=0)
        codes = gptq(rows[:, fine:], self.rest, form, refined)
        rest = (TABLE, form, codes)
        if self.fine is None or self.paid is None:
            return [rest]
        wanted = rows[:, :fine] - (dequantize(codes, form) - rows[:, fine:]) @ self.paid
        return [(f"{TABLE}.fine", INT8, gptq(wanted, self.fine, INT8, refined)), rest]


def prepare_table(curvature: Tensor, form: Format) -> TableInputs:
    """From what errors of its rows cost: (M, M), channels in the table's order."""
    if not form.fine:
        return TableInputs(form, prepare(curvature, TABLE_DAMPING))
    square = curvature.double()
    square.diagonal().add_(TABLE_DAMPING * square.diagonal().mean())
    corner, side = square[: form.fine, : form.fine], square[: form.fine, form.fine :]
    paid = torch.linalg.solve(corner, side)  # (F, R)
    rest = (square[form.fine :, form.fine :] - side.T @ paid).float()
    own = prepare(curvature[: form.fine, : form.fine], TABLE_DAMPING)
    return TableInputs(form, prepare((rest + rest.T) / 2, TABLE_DAMPING), own, paid.T.float())
