"""Runs calibration sequences through the model with one layer at a time in memory.

What is between two layers is in files (`flow`). Interrupted work resumes after the last finished
layer. B sequences, T tokens, M width.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.model.batch_ops import BatchOps, CachingOps, HeldWeight, ObservingOps, hold
from gemma_export.model.config import GemmaConfig, LayerSpec
from gemma_export.model.decoder import decoder_layer, norm_before
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.flow import (
    Batch,
    FlowReader,
    KeysValues,
    LayerInputs,
    all_of,
    next_flow,
    start_flow,
)
from gemma_export.quantize.calibrate.layer_files import FlowFiles
from gemma_export.quantize.calibrate.layer_weights import load_layer, short
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.shards import Sums

Kind = TypeVar("Kind", bound=BatchOps)
Seen = TypeVar("Seen")
_SIDE = 256  # rows of a block of a Gram matrix


def pass_layers(
    work: Workspace,
    files: FlowFiles,
    tick: Tick,
    sequences: int | None = None,
    *,
    keep: bool = False,
) -> None:
    """Run all sequences, or the first, through the float model; writes residuals between layers.

    Resumes after the newest file. Deletes older residuals unless `keep` is set.
    """
    config = work.checkpoint.config
    first = shards.resumed_at(files.highest(), min)
    if first is None:
        first = 0
        start_flow(files, config, work.calibration.tokens[:sequences], work.weight)
    for layer in config.layers[first:]:
        weights = load_layer(work.checkpoint, layer.index, work.device)
        advance_flow(files, config, layer, weights)
        if not keep:
            shards.wait()
            files[layer.index].unlink()
        tick(f"layer {layer.index}, float", 4 * sum(w.numel() for w in weights.values()))


def advance_flow(
    files: FlowFiles, config: GemmaConfig, layer: LayerSpec, weights: Mapping[str, Tensor]
) -> None:
    """Run all sequences through one layer."""
    _advance(files, config, layer, weights, BatchOps, lambda ops: None)


def sample_flow(
    files: FlowFiles,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
    positions: int,
) -> dict[str, Tensor]:
    """Like `advance_flow`; returns about `positions` inputs (P, K) of matrices, none of bos.

    They are from the text of all ranks. Of matrices with the same inputs, only the first is in the
    result.
    """
    reader = FlowReader(files, config, layer)

    def see(ops: ObservingOps) -> dict[str, Tensor]:
        return {
            name: sample_positions(
                rows.view(-1, reader.length, rows.shape[1]), reader.share.count, positions
            ).clone()
            for name, rows in _distinct(ops.inputs)
        }

    seen = _advance(files, config, layer, weights, ObservingOps, see)
    return {
        name: shards.gathered(torch.cat([samples[name] for samples in seen])) for name in seen[0]
    }


def cached_flow(
    files: FlowFiles, config: GemmaConfig, layer: LayerSpec, weights: Mapping[str, Tensor]
) -> list[CachingOps]:
    """Like `advance_flow`; returns what each batch caches."""
    return _advance(files, config, layer, weights, CachingOps, lambda ops: ops)


def _advance(
    files: FlowFiles,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
    make: Callable[[Tensor, float], Kind],
    see: Callable[[Kind], Seen],
) -> list[Seen]:
    """Run all sequences through one layer; returns what `see` makes of each batch's operations."""
    reader, held = FlowReader(files, config, layer), hold(short(weights))

    def run(batch: Batch) -> tuple[Tensor, KeysValues | None, Seen]:
        inputs = reader.read(*batch.span)
        with torch.inference_mode():
            ops = make(torch.empty(inputs.x.shape[:2]), config.rms_norm_eps)
            y = run_layer(ops, config, layer, held, inputs)
            return y, ops.lent.get(layer.kind), see(ops)

    seen: list[Seen] = []
    with next_flow(files, config, layer) as write:
        for y, lent, one in in_order(run, reader.batches()):
            write(y, lent)
            seen.append(one)
    return seen


def sample_positions(rows: Tensor, count: int, positions: int) -> Tensor:
    """Of (B, T, K), a batch of `count` sequences: its share (P, K) of `positions`, none of bos."""
    every = -(-count * (rows.shape[1] - 1) // positions)
    return rows[:, 1:].flatten(0, 1)[::every]


def observe_layer(
    files: FlowFiles,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
    choose: Callable[[range], range] = all_of,
) -> dict[str, Tensor]:
    """The Gram matrix E[x xᵀ] of each matrix's inputs, (K, K), of the text of all ranks; or of the
    sequences that are chosen of each piece. Shared inputs share a tensor.
    """
    reader, held = FlowReader(files, config, layer), hold(short(weights))
    spans, sums = reader.batches(choose), Sums()

    def run(batch: Batch) -> dict[str, Tensor]:
        inputs = reader.read(*batch.span)
        with torch.inference_mode():
            ops = ObservingOps(torch.empty(inputs.x.shape[:2]), config.rms_norm_eps)
            run_layer(ops, config, layer, held, inputs)
        return ops.inputs

    for batch, seen in zip(spans, in_order(run, spans), strict=True):
        grams = sums.of(batch.piece)
        for first, rows in _distinct(seen):  # in one thread, so they share a wide Gram matrix
            if first not in grams:
                grams[first] = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_gram(grams[first], rows)
        shared = {name: _owner(seen, name) for name in seen}
    grams, count = sums.total(), shards.summed(sum(batch.stop - batch.start for batch in spans))
    for gram in grams.values():
        mirror(gram).div_(count * reader.length)
    return {name: grams[first] for name, first in shared.items()}


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Add Σ x xᵀ over rows, only to blocks on and above the diagonal."""
    for start in range(0, len(gram), _SIDE):
        stop = start + _SIDE
        gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirror(gram: Tensor) -> Tensor:
    """Copy the blocks above the diagonal to those below."""
    for start in range(0, len(gram), _SIDE):
        stop = start + _SIDE
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def run_layer(
    ops: BatchOps,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, HeldWeight],
    inputs: LayerInputs,
) -> Tensor:
    """The residual after the layer. `ops.lent` then has the keys and values that it attended to."""
    if inputs.lent is not None:
        ops.lent[layer.kind] = inputs.lent
    h = ops.norm(inputs.x, weights[norm_before(config, layer.index)])
    return decoder_layer(ops, config, layer, weights.__getitem__, inputs.x, h, inputs.part)[0]


def _distinct(seen: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, rows) for name, rows in seen.items() if _owner(seen, name) == name)


def _owner(seen: Mapping[str, Tensor], name: str) -> str:
    """The first weight with the same input."""
    return next(first for first, rows in seen.items() if rows is seen[name])
