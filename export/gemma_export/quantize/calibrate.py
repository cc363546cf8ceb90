"""Calibrated rounding, layer by layer.

A layer is rounded for what the layers before it give as they are rounded already. It needs no more
memory than one layer and the Gram matrices of its inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gemma_export.checkpoint.safetensors import SafetensorsFile
from gemma_export.decoder import norm_before
from gemma_export.memory import release_memory
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrator import Calibrator
from gemma_export.quantize.gptq import gptq, prepare
from gemma_export.quantize.recipe import TABLE
from gemma_export.quantize.round import round_rows
from gemma_export.quantize.store import StoredWeight, named_parts
from gemma_export.quantize.stream import (
    advance_flow,
    head_inputs,
    layer_bytes,
    load_layer,
    observe_layer,
    start_flow,
    write_tensors,
)

# Embedding and head are one tensor: the head's inputs have a Gram matrix, a looked-up row has none,
# so a share of the identity stands for it.
_TABLE_DAMPING = 0.1
TABLE_ROWS = 2048  # rounded at a time: column by column, fewer cost as much time as these
_SEQUENCES = 384  # that layers are rounded for; more text changes little


def calibrate(work: Calibrator, tick: Tick) -> None:
    """Round every matrix: a file per layer, one of the table. Takes up what is there.

    Where the table's rounding is gptq, all sequences have passed the float model (`float`).
    """
    config = work.checkpoint.config
    calibrate_table(work)
    first = _first_unfinished(work)
    if first == 0 and not work.file("residual", 0).exists():
        tokens = work.calibration.tokens[:_SEQUENCES]
        start_flow(work.file("residual", 0), config, tokens, work.table())
    for layer in config.layers[first:]:
        weights, source = (
            load_layer(work.checkpoint, layer.index),
            work.file("residual", layer.index),
        )
        path, size = work.file("layer", layer.index), 4 * sum(w.numel() for w in weights.values())
        if not path.exists():
            grams = observe_layer(source, config, layer, weights)
            release_memory()  # a layer's scattered remains would make the next one's peak higher
            tick(f"layer {layer.index}", size)
            write_tensors(path, _round_layer(work, weights, grams))
            del grams
            release_memory()
        if layer.index + 1 < len(config.kinds):
            rounded = rounded_layer(work, layer.index, weights)
            advance_flow(source, work.file("residual", layer.index + 1), config, layer, rounded)
        source.unlink()
        tick(f"layer {layer.index}", size)


def calibrate_bytes(work: Calibrator) -> int:
    """Of weights that are still to be observed, rounded and passed by, for progress."""
    config = work.checkpoint.config
    return 2 * (len(config.kinds) - _first_unfinished(work)) * layer_bytes(config)


def rounded_layer(work: Calibrator, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's weights as its codes say, beside those that stay float."""
    file, formats = SafetensorsFile(work.file("layer", index)), work.formats()
    return {
        name: StoredWeight(name, tuple(values.shape), formats[name], file).rows(0, len(values))
        if f"{name}.codes" in file.tensors
        else values
        for name, values in weights.items()
    }


def _first_unfinished(work: Calibrator) -> int:
    """A layer is finished once the next one's residuals are there; the last, once it is rounded."""
    count = len(work.checkpoint.config.kinds)
    if work.file("layer", count - 1).exists():
        return count
    return next((i for i in range(count, 0, -1) if work.file("residual", i).exists()), 0)


def _round_layer(
    work: Calibrator, weights: Mapping[str, Tensor], grams: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    formats = work.formats()

    def quantize(name: str) -> dict[str, Tensor]:
        form, rounding = formats[name], work.recipe.rule(name).rounding
        if form.is_float:
            return {name: weights[name]}
        if rounding == "gptq":
            return named_parts(name, gptq(weights[name], prepare(grams[name]), form))
        return named_parts(name, round_rows(weights[name], form, rounding))

    found: dict[str, Tensor] = {}
    for parts in in_order(quantize, grams):
        found |= parts
    return found


def calibrate_table(work: Calibrator) -> None:
    path, form = work.file("table"), work.formats()[TABLE]
    if path.exists():
        return
    rounding = work.recipe.rule(TABLE).rounding
    inputs = prepare(_head_gram(work), _TABLE_DAMPING) if rounding == "gptq" else None
    shape = work.checkpoint.config.tensor_shapes()[TABLE]

    def quantize(span: tuple[int, int]) -> dict[str, Tensor]:
        rows = work.checkpoint.rows(TABLE, *span)
        if form.is_float:
            return {TABLE: rows}
        if inputs is None:
            return named_parts(TABLE, round_rows(rows, form, rounding))
        return named_parts(TABLE, gptq(rows, inputs, form))

    starts = range(0, shape[0], TABLE_ROWS)
    spans = [(start, min(start + TABLE_ROWS, shape[0])) for start in starts]
    blocks: list[dict[str, Tensor]] = list(in_order(quantize, spans))
    write_tensors(path, {name: torch.cat([b[name] for b in blocks]) for name in blocks[0]})


def _head_gram(work: Calibrator) -> Tensor:
    config = work.checkpoint.config
    count = len(config.kinds)
    gain = work.checkpoint.rows(norm_before(config, count), 0, config.hidden_size)
    gram = torch.zeros(config.hidden_size, config.hidden_size)
    positions = 0
    for rows in head_inputs(work.file("float", count), config, gain):
        gram.addmm_(rows.T, rows)
        positions += len(rows)
    return gram / positions
