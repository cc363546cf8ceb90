"""Residual channels in an order that suits groups.

A few channels of Gemma's table are ten times as large as the others, and every other weight that
shares a scale with one is rounded as coarsely as it. All that reads or writes the residual may take
its channels in another order, and every norm goes channel by channel: the model stays the same, to
the last bit but for the order of sums. So channels are given to groups where the coarse ones do
least harm; where the table's first channels are held in 8 bits, the worst ones go there.

V vocabulary, M width, g channels per group, R rows of the table that stand for all.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.config import GemmaConfig
from gemma_export.quantize.gptq import prepare
from gemma_export.quantize.recipe import TABLE, Format

_ROWS = 256
_SWAPS = 64  # tried for each channel
_SEED = 0
TABLE_DAMPING = 1e-3  # bos makes the mean of the curvature a multiple of what most channels have
_WRITERS = ("o_proj.weight", "down_proj.weight")
_OWN_CHANNELS = ("q_norm.weight", "k_norm.weight")  # gains over a head's, not the residual's


@dataclass(frozen=True, slots=True)
class ArrangedCheckpoint:
    """A checkpoint whose model has its residual channels in another order, and says the same."""

    source: Checkpoint
    order: Tensor  # (M,) the source's channels

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
        if name.endswith(_WRITERS) or name.endswith("norm.weight"):
            return self.source.rows(name, 0, len(self.order))[self.order[start:stop]]
        return self.source.rows(name, start, stop)[:, self.order]

    def digest(self) -> str:
        """The source's: it is the same model."""
        return self.source.digest()

    def tokenizer(self) -> TokenizerFiles | None:
        return self.source.tokenizer()


def arrange_channels(checkpoint: Checkpoint, curvature: Tensor, form: Format) -> Tensor:
    """(M,) an order of the channels, for the least loss of a 4-bit table.

    `curvature` (M, M) is what errors of its rows cost. Two channels change groups as long as the
    loss foretold of their groups becomes less by it; starts from the order there is, but for the
    largest channels that fine ones are.
    """
    vocabulary, width = checkpoint.config.tensor_shapes()[TABLE]
    draw = torch.Generator().manual_seed(_SEED)
    rows = torch.randperm(vocabulary, generator=draw)[:_ROWS].sort().values
    sample = torch.cat([checkpoint.rows(TABLE, r, r + 1) for r in rows.tolist()])
    worth = prepare(curvature, TABLE_DAMPING).worth
    foretold = _Loss(sample.abs().T.contiguous(), worth)
    size = sample.square().mean(0) * worth
    start = size.argsort(descending=True, stable=True)[: form.fine]
    left = torch.ones(width, dtype=torch.bool)
    left[start] = False
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
    return torch.cat(groups)


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
