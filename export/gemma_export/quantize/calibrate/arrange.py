"""Residual channels in an order that suits groups.

A few channels of Gemma's table are ten times as large as the others, and every other weight that
shares a scale with one is rounded as coarsely as it. All that reads or writes the residual may take
its channels in another order, and every norm goes channel by channel: the model stays the same, to
the last bit but for the order of sums. So channels are given to groups where the coarse ones do
least harm; where the table's first channels are held in 8 bits, the worst ones go there.

A table with such channels has factors besides: what multiplies a column divides the final gain, and
every lookup divides by it again. In int4 they balance what channels lose, as `balance` does. In
int8 they make the head's inputs more alike, which runtimes round to 8 bits in groups: one channel
of a 270M's is a hundred times as large as most, and left nothing of its neighbours (with float
weights the KL of that rounding falls from 0.0075 to 0.0011; with the squares of these factors, to
0.0003, but then the table loses more than that).

V vocabulary, M width, g channels per group, R rows of the table that stand for all.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import TABLE, GemmaConfig
from gemma_export.model.decoder import norm_before
from gemma_export.quantize.calibrate.gptq import prepare

_ROWS = 256
_SWAPS = 64  # tried for each channel
_SEED = 0
_POWER = 0.25  # of what would make channels alike; a 270M's int4 table loses least, 0.18 for 0.22
_MOST = 16.0  # a factor, and its inverse
TABLE_DAMPING = 1e-3  # bos makes the mean of the curvature a multiple of what most channels have
_WRITERS = ("o_proj.weight", "down_proj.weight")
_OWN_CHANNELS = ("q_norm.weight", "k_norm.weight")  # gains over a head's, not the residual's


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Channels of the table in another order, and multiplied by factors if it has some."""

    order: Tensor  # (M,) the source's channels
    factors: Tensor | None = None  # (M,) in that order

    def rows(self, table: Tensor) -> Tensor:
        """Rows (N, M) of the source's table → of the arranged one."""
        arranged = table[:, self.order]
        return arranged if self.factors is None else arranged * self.factors

    def curvature(self, curvature: Tensor) -> Tensor:
        """What errors of the source's rows cost (M, M) → of the arranged ones."""
        arranged = curvature[self.order][:, self.order]
        if self.factors is None:
            return arranged
        return arranged / self.factors[:, None] / self.factors

    def tensors(self) -> dict[str, Tensor]:
        """As `read_arrangement` finds it."""
        factors = {} if self.factors is None else {"factors": self.factors}
        return {"order": self.order.int(), **factors}


def read_arrangement(path: Path, width: int) -> Arrangement:
    file = SafetensorsFile(path)
    factors = file.rows("factors", 0, width) if "factors" in file.tensors else None
    return Arrangement(file.rows("order", 0, width).long(), factors)


@dataclass(frozen=True, slots=True)
class ArrangedCheckpoint:
    """A checkpoint whose model has its residual channels arranged, and says the same."""

    source: Checkpoint
    arrangement: Arrangement

    @property
    def id(self) -> str:
        return self.source.id

    @property
    def revision(self) -> str | None:
        return self.source.revision

    @property
    def config(self) -> GemmaConfig:
        return self.source.config

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads all of what writes the residual: its rows are channels."""
        if name.endswith(_OWN_CHANNELS):
            return self.source.rows(name, start, stop)
        order, factors = self.arrangement.order, self.arrangement.factors
        if name == TABLE:
            return self.arrangement.rows(self.source.rows(name, start, stop))
        if name.endswith(_WRITERS) or name.endswith("norm.weight"):
            values = self.source.rows(name, 0, len(order))[order[start:stop]]
            if factors is None or name != norm_before(self.config, len(self.config.kinds)):
                return values
            return (1 + values) / factors[start:stop] - 1
        return self.source.rows(name, start, stop)[:, order]

    def digest(self) -> str:
        """The source's: it is the same model."""
        return self.source.digest()

    def tokenizer(self) -> TokenizerFiles | None:
        return self.source.tokenizer()


def arrange_channels(checkpoint: Checkpoint, curvature: Tensor, form: Format) -> Arrangement:
    """An order of the channels, for the least loss of a 4-bit table.

    `curvature` (M, M) is what errors of its rows cost. Two channels change groups as long as the
    loss foretold of their groups becomes less by it; starts from the order there is, but for the
    largest channels that fine ones are. A table with fine ones has factors too.
    """
    vocabulary, width = checkpoint.config.tensor_shapes()[TABLE]
    draw = torch.Generator().manual_seed(_SEED)
    rows = torch.randperm(vocabulary, generator=draw)[:_ROWS].sort().values
    sample = torch.cat([checkpoint.rows(TABLE, r, r + 1) for r in rows.tolist()])
    worth = prepare(curvature, TABLE_DAMPING).worth
    power = sample.square().mean(0)
    start = (power * worth).argsort(descending=True, stable=True)[: form.fine]
    left = torch.ones(width, dtype=torch.bool)
    left[start] = False
    factors = torch.ones(width)
    if form.fine:
        factors[start] = _level(curvature.diagonal()[start])
        factors[left] = _level(worth[left] / power[left].clamp(min=1e-20))
    foretold = _Loss((sample * factors).abs().T.contiguous(), worth / factors.square())
    group = form.group
    groups = list(torch.cat((start, left.nonzero().flatten())).view(-1, group).unbind())
    middles = [128 if i * group < form.fine else 8 for i in range(len(groups))]
    losses = [foretold(channels, middle) for channels, middle in zip(groups, middles, strict=True)]
    choose = random.Random(_SEED)
    for _ in range(_SWAPS * width if len(groups) > 1 else 0):
        (a,) = choose.choices(range(len(groups)), losses)  # the worst most often
        b = choose.randrange(len(groups))
        one, other = groups[a].clone(), groups[b].clone()
        i, j = choose.randrange(group), choose.randrange(group)
        one[i], other[j] = groups[b][j], groups[a][i]
        found = foretold(one, middles[a]), foretold(other, middles[b])
        if a != b and sum(found) < losses[a] + losses[b]:
            groups[a], groups[b] = one, other
            losses[a], losses[b] = found
    order = torch.cat(groups)
    return Arrangement(order, factors[order] if form.fine else None)


def _level(powers: Tensor) -> Tensor:
    """Factors of channels, whose geometric mean is 1, by squares of what is to be alike."""
    log = _POWER / 2 * powers.clamp(min=1e-20).log()
    return (log - log.mean()).exp_().clamp_(1 / _MOST, _MOST)


@dataclass(frozen=True, slots=True)
class _Loss:
    """What rounding a group of channels costs, about, to codes on both sides of `middle`."""

    sizes: Tensor  # (M, R) |w|
    worth: Tensor  # (M,) of an error of each channel

    def __call__(self, channels: Tensor, middle: int) -> float:
        sizes = self.sizes[channels]  # (g, R)
        error = (
            (sizes.amax(0) / middle).square_().div_(12)
        )  # of a step that the largest one asks for
        most = sizes.square().mean(1, keepdim=True)  # a weight that is left out costs no more
        return float((torch.minimum(error, most).mean(1) * self.worth[channels]).sum())
