"""Selects the part of the vocabulary on which distillation computes the KL.

The logits of 262,144 tokens cost more than a small model's layers. Candidates are the tokens of the
calibration text, those that the float model considers most likely, and a weighted sample of all
others. P positions, M width, V vocabulary, C candidates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export import shards
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.torch_ops import rms_norm, soft_capped
from gemma_export.parallel import in_order
from gemma_export.quantize.calibrate.flow import RESIDUAL, read_share
from gemma_export.quantize.calibrate.workspace import Workspace

_LIKELY, _OTHERS = 16384, 8192
CANDIDATES = _LIKELY + _OTHERS
_POSITIONS = 1024  # sampled to find likely tokens
_SEED = 0


@dataclass(frozen=True, slots=True)
class Candidates:
    teacher: Tensor  # (C, M) rows of the float head
    student: Tensor  # (C, M) rows of the rounded head
    log_weight: Tensor  # (C,) log of the number of tokens that a candidate represents
    softcap: float | None

    def divergence(self, target: Tensor, ours: Tensor, dtype: torch.dtype) -> Tensor:
        """Mean KL of the student to the float model, from their heads' inputs, (P, M) each."""
        with torch.no_grad():
            want = self._logits(target, self.teacher, dtype).log_softmax(-1)
        got = self._logits(ours, self.student, dtype).log_softmax(-1)
        return (want.exp() * (want - got)).sum(-1).mean()

    def _logits(self, h: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        y = functional.linear(h.to(dtype), rows.to(dtype)).float()
        return soft_capped(y, self.softcap) + self.log_weight


def choose_candidates(work: Workspace, teacher: SafetensorsFile, gain: Tensor) -> Candidates:
    config = work.checkpoint.config
    tokens = work.calibration.tokens
    score = _likelihood(work, teacher, gain).cpu()  # (V,)
    score[torch.unique(tokens)] += 1
    likely = score.topk(min(_LIKELY, config.vocab_size)).indices
    rest = torch.ones(config.vocab_size, dtype=torch.bool)
    rest[likely] = False
    others = rest.nonzero().flatten()
    draw = torch.randperm(len(others), generator=torch.Generator().manual_seed(_SEED))[:_OTHERS]
    weight = torch.zeros(len(likely) + len(draw))
    weight[len(likely) :] = math.log(len(others) / max(1, len(draw))) if len(draw) else 0
    chosen = torch.cat((likely, others[draw]))
    order = chosen.argsort()
    rows = _rows(work, chosen[order])
    return Candidates(*rows, weight[order].to(work.device), config.final_softcap)


def _likelihood(work: Workspace, teacher: SafetensorsFile, gain: Tensor) -> Tensor:
    """(V,) the float model's mean probability of every token over a sample of positions."""
    config = work.checkpoint.config
    text, (_, length, _) = read_share(teacher), teacher.tensors[RESIDUAL].shape
    sequences = range(0, text.count, max(1, text.count * 16 // _POSITIONS))
    own = (i - text.own.start for i in sequences if i in text.own)
    picked = torch.cat([teacher.rows(RESIDUAL, i, i + 1)[0, :: max(1, length // 16)] for i in own])
    hidden = rms_norm(shards.gathered(picked), gain, config.rms_norm_eps)

    def logits(span: tuple[int, int]) -> Tensor:
        return soft_capped(hidden @ work.rows(config.head, *span).T, config.final_softcap)

    total = hidden.new_full((len(hidden),), -torch.inf)
    spans = list(row_blocks(config.tensor_shapes()[config.head]))
    for part in shards.dealt(lambda span: logits(span).logsumexp(-1), spans):
        total = torch.logaddexp(total, part.to(total.device))
    means = shards.dealt(lambda span: (logits(span) - total[:, None]).exp().mean(0), spans)
    return torch.cat(list(means))


def _rows(work: Workspace, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen rows, (C, M) each, of the float head and the rounded head, on the device."""
    name = work.checkpoint.config.head
    head = work.table(name)

    def read(span: tuple[int, int]) -> tuple[Tensor, Tensor]:
        here = chosen[(chosen >= span[0]) & (chosen < span[1])] - span[0]
        return work.checkpoint.rows(name, *span)[here], head.rows(*span)[here]

    parts = list(in_order(read, row_blocks(work.checkpoint.config.tensor_shapes()[name])))
    exact, rounded = (torch.cat(column).to(work.device) for column in zip(*parts, strict=True))
    return exact, rounded
