"""Reorders residual channels so that quantization groups of table and head lose less.

A few channels of Gemma's table are ten times as large as the others, and every weight that shares a
scale with one of them is rounded as coarsely. Permuting the residual's channels in every weight
that reads or writes it leaves the model unchanged except for the order of sums, since norms act per
channel. So channels are assigned to groups where large ones do least harm. If the table's first
channels are int8, the worst channels go there.

Such a table also has column factors: they multiply a column, divide the final norm's gain, and
divide again after every lookup. For int4 channels they balance the losses, as in `balance`. For
int8 channels they make the head's inputs more alike, because runtimes round those inputs to int8 in
groups. One channel of the 270M is a hundred times as large as most, and its group lost nearly all
precision. With float weights these factors reduce the KL of that rounding from 0.0075 to 0.0011;
their squares reduce it to 0.0003, but then the table loses more than that.

V vocabulary, M width, g channels per group, R sampled rows of the table.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import PER_LAYER_NORM, PER_LAYER_TABLE, TABLE
from gemma_export.model.decoder import norm_before
from gemma_export.quantize.calibrate.balance import divided_gain
from gemma_export.quantize.calibrate.gptq import prepare
from gemma_export.quantize.calibrate.rewritten import RewrittenCheckpoint

_ROWS = 256
SWAPS = 64  # swaps tried per channel
_SEED = 0
_POWER = 0.25  # 1 would make channels equal; 0.25 is best on the 270M (table KL 0.18, not 0.22)
_MOST = 16.0  # factors lie in [1 / _MOST, _MOST]
TABLE_DAMPING = 1e-3  # small: bos raises the mean curvature far above that of most channels
_WRITERS = ("o_proj.weight", "down_proj.weight", "per_layer_projection.weight")
# Channels of a head, of per-layer embeddings, or of nothing; not the residual's.
_OWN_CHANNELS = (
    "q_norm.weight",
    "k_norm.weight",
    "layer_scalar",
    PER_LAYER_TABLE,
    PER_LAYER_NORM,
)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A permutation of the residual's channels, and optional column factors of the table."""

    order: Tensor  # (M,) channel of the source at each place
    factors: Tensor | None = None  # (M,) in the new order

    def rows(self, table: Tensor) -> Tensor:
        """Rows (N, M) of the source's table → rows of the arranged table."""
        arranged = table[:, self.order]
        return arranged if self.factors is None else arranged * self.factors

    def curvature(self, curvature: Tensor) -> Tensor:
        """Curvature (M, M) for the source's rows → for the arranged rows."""
        arranged = curvature[self.order][:, self.order]
        if self.factors is None:
            return arranged
        return arranged / self.factors[:, None] / self.factors

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a file that `read_arrangement` reads."""
        factors = {} if self.factors is None else {"factors": self.factors}
        return {"order": self.order.int(), **factors}


def read_arrangement(path: Path, width: int) -> Arrangement:
    file = SafetensorsFile(path)
    factors = file.rows("factors", 0, width) if "factors" in file.tensors else None
    return Arrangement(file.rows("order", 0, width).long(), factors)


@dataclass(frozen=True, slots=True)
class ArrangedCheckpoint(RewrittenCheckpoint):
    """A checkpoint with permuted residual channels; its model computes the same logits."""

    arrangement: Arrangement

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the arranged weight. Weights that write the residual are read whole: their rows
        are channels.
        """
        if name.endswith(_OWN_CHANNELS):
            return self.source.rows(name, start, stop)
        order, factors = self.arrangement.order, self.arrangement.factors
        if name == TABLE:
            return self.arrangement.rows(self.source.rows(name, start, stop))
        if name.endswith(_WRITERS) or name.endswith("norm.weight"):
            values = self.source.rows(name, 0, len(order))[order[start:stop]]
            if factors is None or name != norm_before(self.config, len(self.config.kinds)):
                return values
            return divided_gain(values, factors[start:stop])
        return self.source.rows(name, start, stop)[:, order]


def arrange_channels(
    checkpoint: Checkpoint, curvatures: Mapping[str, Tensor], fmt: Format
) -> Arrangement:
    """Search an order of the channels that gives table and head the least estimated loss.

    `curvatures` (M, M) give the cost of an error in a row of each matrix. Starting from the
    source's order, with the costliest channels in front if some are int8, random swaps between two
    groups are kept when they reduce the groups' estimated loss. A table with int8 channels also
    gets factors. All is on the host: the swaps are many small steps, one after another.
    """
    width = checkpoint.config.hidden_size
    curvatures = {name: own.cpu() for name, own in curvatures.items()}
    samples = {name: sample_rows(checkpoint, name) for name in curvatures}
    costs = {name: prepare(own, TABLE_DAMPING).cost for name, own in curvatures.items()}
    sample, cost = samples[TABLE], costs[TABLE]
    power = sample.square().mean(0)
    start = (power * cost).argsort(descending=True, stable=True)[: fmt.int8_columns]
    left = torch.ones(width, dtype=torch.bool)
    left[start] = False
    factors = torch.ones(width)
    if fmt.int8_columns:
        factors[start] = _level(curvatures[TABLE].diagonal()[start])
        factors[left] = _level(cost[left] / power[left].clamp(min=1e-20))
    estimates = [
        _Loss((samples[name] * factors).abs().T.contiguous(), own / factors.square())
        for name, own in costs.items()
    ]

    def estimate(channels: Tensor, middle: int) -> float:
        return sum(loss(channels, middle) for loss in estimates)

    group = fmt.group
    groups = list(torch.cat((start, left.nonzero().flatten())).view(-1, group).unbind())
    middles = [128 if i * group < fmt.int8_columns else 8 for i in range(len(groups))]
    losses = [estimate(channels, middle) for channels, middle in zip(groups, middles, strict=True)]
    choose = random.Random(_SEED)
    for _ in range(SWAPS * width if len(groups) > 1 else 0):
        (a,) = choose.choices(range(len(groups)), losses)  # groups with a larger loss more often
        b = choose.randrange(len(groups))
        one, other = groups[a].clone(), groups[b].clone()
        i, j = choose.randrange(group), choose.randrange(group)
        one[i], other[j] = groups[b][j], groups[a][i]
        swapped = estimate(one, middles[a]), estimate(other, middles[b])
        if a != b and sum(swapped) < losses[a] + losses[b]:
            groups[a], groups[b] = one, other
            losses[a], losses[b] = swapped
    order = torch.cat(groups)
    return Arrangement(order, factors[order] if fmt.int8_columns else None)


def sample_rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """Rows (R, M) of the table, or of a head apart from it: those of the same tokens."""
    draw = torch.Generator().manual_seed(_SEED)
    tokens = torch.randperm(checkpoint.config.vocab_size, generator=draw)[:_ROWS].sort().values
    return torch.cat([checkpoint.rows(name, token, token + 1) for token in tokens.tolist()])


def _level(powers: Tensor) -> Tensor:
    """Factors with geometric mean 1 that make channels of these powers more alike."""
    log = _POWER / 2 * powers.clamp(min=1e-20).log()
    return (log - log.mean()).exp_().clamp_(1 / _MOST, _MOST)


@dataclass(frozen=True, slots=True)
class _Loss:
    """Estimates the loss of rounding a group of channels to codes around `middle`."""

    sizes: Tensor  # (M, R) |w|
    cost: Tensor  # (M,) cost of a unit error in each channel

    def __call__(self, channels: Tensor, middle: int) -> float:
        sizes = self.sizes[channels]  # (g, R)
        # Variance of rounding with the step that the largest weight needs.
        error = (sizes.amax(0) / middle).square_().div_(12)
        most = sizes.square().mean(1, keepdim=True)  # the error of rounding a weight to 0
        return float((torch.minimum(error, most).mean(1) * self.cost[channels]).sum())
