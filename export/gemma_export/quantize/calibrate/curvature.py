"""Estimates the KL that rounding a single matrix costs the model.

A rounding error E (N, K) of a matrix costs about ½ tr(E A Eᵀ C) nats per token. A is the Gram
matrix of its inputs; C = E[g gᵀ] (N, N) is the second moment of its output gradients (see
`fisher`). They are the Kronecker factors of the Fisher information (K-FAC,
https://arxiv.org/abs/1503.05671). Only diagonal blocks of C are kept. E comes from the recipe's own
rounding, calibrated or not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.device import HOST
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import dequantize
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import HEAD, PER_LAYER_TABLE, TABLE, GemmaConfig, LayerSpec
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.arrange import arrange_channels
from gemma_export.quantize.calibrate.fisher import (
    backward_bytes,
    backward_layer,
    information_peak_bytes,
    layer_backward_bytes,
    layer_peak_bytes,
    part_information,
    start_backward,
    store_errors,
    table_information,
)
from gemma_export.quantize.calibrate.flow import write_shared
from gemma_export.quantize.calibrate.gptq import Inputs, gptq, prepare
from gemma_export.quantize.calibrate.layer_weights import layer_names, load_layer
from gemma_export.quantize.calibrate.split import prepare_table
from gemma_export.quantize.calibrate.stream import observe_layer
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import Recipe, int8_choices
from gemma_export.quantize.round import round_rows
from gemma_export.shards import HELD

WIDEST = 2048  # most outputs per block of C
SPARSE = 4  # every n-th block of the table is rounded by gptq to estimate its loss
_MOST_TRIED = 5  # numbers of int8 channels tried
_ROUND = 20  # cost of a table's loss relative to reading its weights


@dataclass(frozen=True, slots=True)
class Losses:
    """KL per token, in nats."""

    matrices: Mapping[str, float]  # loss of each matrix when only it is rounded
    table: Mapping[int, float]  # number of int8 channels → loss of the table


def measure_losses(work: Workspace, tick: Tick) -> Losses:
    """Measure all losses. Each layer's are stored at once, so interrupted work resumes."""
    config, table = work.checkpoint.config, work.table_losses
    if not shards.from_first(table.exists):
        for layer in reversed(config.layers[: start_backward(work, tick)]):
            _measure_layer(work, layer)
            tick(f"layer {layer.index}, back", layer_backward_bytes(config))
        losses = _table_losses(work, tick)
        write_shared(table, {name: torch.tensor([loss]) for name, loss in losses.items()})
    work.end_backward()
    matrices: dict[str, float] = {}
    for layer in config.layers:
        matrices |= _read_losses(work.losses[layer.index])
    by_columns = _read_losses(table)
    matrices |= {n: by_columns.pop(n) for n in (HEAD, PER_LAYER_TABLE) if n in by_columns}
    return Losses(matrices, {int(n): loss for n, loss in by_columns.items()})


def loss_bytes(work: Workspace) -> int:
    """Progress units left: bytes of weights still to be read, weighted by cost."""
    if work.table_losses.exists():
        return 0
    config = work.checkpoint.config
    shapes = config.tensor_shapes()
    tables = len(tried_columns(config, work.recipe)) + len(config.tables) - 1
    weights = tables * prod(shapes[TABLE]) + prod(shapes.get(PER_LAYER_TABLE, (0,)))
    return backward_bytes(work) + _ROUND * 4 * weights


def loss_peak_bytes(config: GemmaConfig, kind: str = HOST) -> int:
    """Upper bound of the memory that measuring takes on a kind of device, in bytes, without the
    libraries.
    """
    peaks: list[int] = []
    for layer in config.layers:
        shapes = [config.tensor_shapes()[name] for name in layer_names(config, layer.index)]
        matrices = [shape for shape in shapes if len(shape) == 2]
        inputs = {width for _, width in matrices}
        blocks = sum(4 * rows**2 // _blocks_of(rows) for rows, _ in matrices)
        gram = sum(n**2 for n in inputs)
        grams = 4 * max(HELD * gram, gram + 5 * max(inputs) ** 2)
        peaks.append(layer_peak_bytes(config, layer, blocks, kind) + grams)
    return max(information_peak_bytes(config, kind), *peaks)


def _measure_layer(work: Workspace, layer: LayerSpec) -> None:
    """Store the losses of a layer's matrices, and the gradient for the layer before it.

    GPTQ rounds for one half of each piece's sequences and is judged on the other half: on its own
    text it looks better than it is.
    """
    weights, formats = load_layer(work.checkpoint, layer.index, work.device), work.formats()
    known, unseen = (
        observe_layer(work.float_residuals, work.checkpoint.config, layer, weights, half)
        for half in (_first_half, _second_half)
    )
    errors, curvatures = backward_layer(work, layer, _outer)

    def measure(name: str) -> float:
        inputs = prepare(known[name]) if work.recipe.rule(name).rounding == "gptq" else None
        error = _rounding_error(weights[name], formats[name], inputs)
        return _loss(error, unseen[name], curvatures[name])

    names = [name for name in curvatures if formats[name].bits == 4]  # others have no loss to spare
    losses = dict(zip(names, shards.dealt(measure, names), strict=True))
    write_shared(work.losses[layer.index], {n: torch.tensor([v]) for n, v in losses.items()})
    store_errors(work, layer, errors)


def _first_half(sequences: range) -> range:
    return sequences[: (len(sequences) + 1) // 2]


def _second_half(sequences: range) -> range:
    return sequences[len(sequences) // 2 :]  # a single sequence is in both halves


def _outer(gradients: Tensor) -> Tensor:
    """Σ g gᵀ over (P, N), in blocks: (n, N / n, N / n)."""
    parts = gradients.view(len(gradients), _blocks_of(gradients.shape[1]), -1).transpose(0, 1)
    return parts.transpose(1, 2) @ parts  # parts are (n, P, N / n)


def _blocks_of(rows: int) -> int:
    """The number of blocks of C for a matrix with this many outputs."""
    return next(n for n in range(-(-rows // WIDEST), rows + 1) if rows % n == 0)


def _loss(error: Tensor, gram: Tensor, curvature: Tensor) -> float:
    """½ tr(E A Eᵀ C), with E (N, K), A (K, K) and the blocks of C (n, b, b)."""
    products = (error @ gram).view(len(curvature), -1, error.shape[1])
    return 0.5 * float((products * (curvature @ error.view_as(products))).sum())


def tried_columns(config: GemmaConfig, recipe: Recipe) -> list[int]:
    """The numbers of int8 channels to try; only a tied table rounded by gptq can have some."""
    by_gptq = recipe.rule(TABLE).rounding == "gptq" and config.tied
    some = list(int8_choices(config.hidden_size)) if by_gptq else []
    return [0, *some[:: -(-len(some) // _MOST_TRIED) or 1]]


def _table_losses(work: Workspace, tick: Tick) -> dict[str, float]:
    """By number of int8 columns; by name, those of a head apart from the table, and of the table of
    per-layer embeddings.
    """
    curvatures, shares = table_information(work)
    losses: dict[str, float] = {}
    size = _ROUND * 4 * len(shares) * work.checkpoint.config.hidden_size
    for columns in tried_columns(work.checkpoint.config, work.recipe):
        losses[str(columns)] = _table_loss(work, TABLE, columns, curvatures, shares)
        tick(f"table, {columns} int8 columns", size)
    if HEAD in curvatures:
        losses[HEAD] = _table_loss(work, HEAD, 0, curvatures, shares)
        tick("head", size)
    if work.checkpoint.config.per_layer:
        losses[PER_LAYER_TABLE] = _per_layer_loss(work, shares)
        shape = work.checkpoint.config.tensor_shapes()[PER_LAYER_TABLE]
        tick("per-layer table", _ROUND * 4 * prod(shape))
    return losses


def _per_layer_loss(work: Workspace, shares: Tensor) -> float:
    """½ Σ share · Σ eᵀ C e over a sample of rows and over their parts (P,), one for each layer."""
    name, config = PER_LAYER_TABLE, work.checkpoint.config
    fmt, curvatures = work.formats()[name], torch.stack(part_information(work))  # (L, P, P)
    spans = list(row_blocks(config.tensor_shapes()[name]))[::SPARSE]

    def measure(span: tuple[int, int]) -> tuple[float, float]:
        rows, share = work.rows(name, *span), shares[slice(*span)]
        error = _rounding_error(rows, fmt, None)
        parts = error.view(len(error), len(curvatures), -1).transpose(0, 1)  # (L, n, P)
        return float(share @ ((parts @ curvatures) * parts).sum((0, 2))), float(share.sum())

    return _mean_loss(list(shards.dealt(measure, spans)), shares)


def _mean_loss(measured: Sequence[tuple[float, float]], shares: Tensor) -> float:
    """Half the loss of all rows, from the loss and the share of those that were measured."""
    losses, seen = zip(*measured, strict=True)
    mean: float = sum(losses) / sum(seen)
    return 0.5 * mean * float(shares.sum())


def _table_loss(
    work: Workspace,
    name: str,
    int8_columns: int,
    curvatures: Mapping[str, Tensor],
    shares: Tensor,
) -> float:
    """½ Σ share · eᵀ H e over a table's rows, or over a sample if gptq rounds them."""
    fmt = replace(work.formats()[name], int8_columns=int8_columns)
    inputs, arrangement, curvature = None, None, curvatures[name]
    spans = list(row_blocks(work.checkpoint.config.tensor_shapes()[name]))
    if work.recipe.rule(name).rounding == "gptq":
        arrangement = shards.from_first(lambda: arrange_channels(work.checkpoint, curvatures, fmt))
        curvature = arrangement.curvature(curvature.cpu()).to(work.device)
        inputs, spans = prepare_table(name, curvature, fmt), spans[::SPARSE]

    def measure(span: tuple[int, int]) -> tuple[float, float]:
        rows, share = work.checkpoint.rows(name, *span), shares[slice(*span)]
        rows = (arrangement.rows(rows) if arrangement else rows).to(work.device)
        error = rows - inputs.rounded(rows) if inputs else _rounding_error(rows, fmt, None)
        return float(share @ ((error @ curvature) * error).sum(-1)), float(share.sum())

    return _mean_loss(list(shards.dealt(measure, spans)), shares)


def _read_losses(path: Path) -> dict[str, float]:
    file = SafetensorsFile(path)
    return {name: float(file.rows(name, 0, 1)) for name in file.tensors}


def _rounding_error(rows: Tensor, fmt: Format, inputs: Inputs | None) -> Tensor:
    codes = gptq(rows, inputs, fmt, 0) if inputs else round_rows(rows, fmt, "searched")
    return rows - dequantize(codes, fmt)
