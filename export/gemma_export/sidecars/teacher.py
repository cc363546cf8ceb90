"""Runs the float32 weights on an evaluation text, for `gemma-runtime eval` to compare with.

Weights are read once per batch of segments. While the table is read by blocks, only the top logits
are kept. B segments, T tokens, R = B · T rows, k top tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.computing import CPU, computing
from gemma_export.formats.blocks import row_blocks
from gemma_export.model.decoder import decoder
from gemma_export.model.ops import Weight
from gemma_export.model.torch_ops import TorchOps, soft_cap_
from gemma_export.progress import Tick
from gemma_runtime.proof.teacher import TOP, TeacherSegment

_BATCH = 8  # segments per pass over the weights


def record_teacher(
    checkpoint: Checkpoint,
    segments: Mapping[str, list[int]],
    progress: Tick,
    device: torch.device = CPU,
) -> list[TeacherSegment]:
    """Run the checkpoint's own weights over every segment."""
    names = sorted(segments, key=lambda name: len(segments[name]))  # to batch similar lengths
    recorded: list[TeacherSegment] = []
    for start in range(0, len(names), _BATCH):
        batch = {name: segments[name] for name in names[start : start + _BATCH]}
        with computing(device):
            recorded += _record(checkpoint, batch, progress, device)
    order = {name: index for index, name in enumerate(segments)}
    return sorted(recorded, key=lambda segment: order[segment.name])


def passes(segments: Sequence[object]) -> int:
    return -(-len(segments) // _BATCH)


def _record(
    checkpoint: Checkpoint,
    segments: Mapping[str, list[int]],
    progress: Tick,
    device: torch.device,
) -> list[TeacherSegment]:
    config, shapes = checkpoint.config, checkpoint.config.tensor_shapes()
    longest = max(map(len, segments.values()))
    # Causal attention never sees the padding at the end.
    padded = [ids + [0] * (longest - len(ids)) for ids in segments.values()]
    tokens = torch.tensor(padded).to(device)

    def source(name: str) -> Weight:
        progress(name, int(np.prod(shapes[name])) * 4)
        return SourceWeight(name, shapes[name], checkpoint)

    ops = _TopOps(tokens, config.rms_norm_eps)
    with torch.inference_mode():
        decoder(ops, config, source)
    return [
        TeacherSegment(
            name=name,
            tokens=np.array(ids, np.int32),
            ids=ops.ids[index, : len(ids)].cpu().numpy().astype(np.int32),
            log_probs=ops.log_probs[index, : len(ids)].cpu().numpy(),
            next_log_probs=ops.next_log_probs[index, : len(ids) - 1].cpu().numpy(),
        )
        for index, (name, ids) in enumerate(segments.items())
    ]


class _TopOps(TorchOps):
    """Keeps the k most likely tokens instead of all logits."""

    ids: Tensor  # (B, T, k)
    log_probs: Tensor  # (B, T, k)
    next_log_probs: Tensor  # (B, T - 1)

    def logits(self, x: Tensor, table: Weight, softcap: float | None) -> Tensor:
        count, length = self._tokens.shape
        x = x.reshape(count * length, -1)  # (R, M)
        after = self._tokens.roll(-1, dims=1).reshape(-1)  # (R,); each segment's last is unused
        top, ids = x.new_empty(len(x), 0), after.new_empty(len(x), 0)
        total, following = x.new_full((len(x),), -torch.inf), x.new_zeros(len(x))
        for start, stop in row_blocks(table.shape):
            y = soft_cap_(x @ table.rows(start, stop).to(x.device).T, softcap)  # (R, rows)
            total = torch.logaddexp(total, y.logsumexp(-1))
            inside = ((after >= start) & (after < stop)).nonzero()[:, 0]
            following[inside] = y[inside, after[inside] - start]
            top, ids = _merge(top, ids, y, start)
        self.ids = ids.view(count, length, -1)
        self.log_probs = (top - total[:, None]).view(count, length, -1)
        self.next_log_probs = (following - total).view(count, length)[:, :-1]
        return top


def _merge(top: Tensor, ids: Tensor, y: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Merge the top tokens so far with a block of new logits, most likely first."""
    new, indices = y.topk(min(TOP, y.shape[1]), dim=-1)
    both, both_ids = torch.cat([top, new], -1), torch.cat([ids, indices + start], -1)
    kept, order = both.topk(min(TOP, both.shape[1]), dim=-1)
    return kept, both_ids.gather(-1, order)
