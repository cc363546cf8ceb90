"""Calibrated rounding, layer by layer.

A layer is rounded for what the layers before it give as they are rounded already. It needs no more
memory than one layer and the Gram matrices of its inputs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, row_blocks
from gemma_export.checkpoint.safetensors import SafetensorsFile
from gemma_export.decoder import norm_before
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibration import Calibration
from gemma_export.quantize.gptq import gptq, prepare
from gemma_export.quantize.recipe import TABLE, Format, Recipe
from gemma_export.quantize.round import round_rows
from gemma_export.quantize.store import StoredWeight, named_parts
from gemma_export.quantize.stream import (
    advance_flow,
    head_inputs,
    load_layer,
    observe_layer,
    start_flow,
    write_tensors,
)
from gemma_runtime.cache import cache_folder

_VERSION = "1"  # of what calibration does: raise it when codes change
# Embedding and head are one tensor: the head's inputs have a Gram matrix, a looked-up row has none,
# so a share of the identity stands for it.
_TABLE_DAMPING = 0.1


@dataclass(frozen=True, slots=True)
class Calibrator:
    """What is rounded for which text, in a folder that keeps the progress."""

    checkpoint: Checkpoint
    recipe: Recipe
    calibration: Calibration

    @property
    def key(self) -> str:
        rules = self.recipe.rules
        parts = (_VERSION, self.checkpoint.digest(), rules, self.calibration.digest)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        return cache_folder() / "calibrated" / self.key

    def file(self, part: str, index: int | None = None) -> Path:
        name = part if index is None else f"{part}-{index:02d}"
        return self.folder / f"{name}.safetensors"

    def formats(self) -> dict[str, Format]:
        return self.recipe.formats(self.checkpoint.config)

    def table(self) -> StoredWeight:
        """The rounded table, once `calibrate_table` has left it."""
        shape = self.checkpoint.config.tensor_shapes()[TABLE]
        return StoredWeight(
            TABLE, shape, self.formats()[TABLE], SafetensorsFile(self.file("table"))
        )


def calibrate(work: Calibrator, tick: Tick) -> None:
    """Round every matrix: a file per layer, one of the table. Takes up what is there."""
    config = work.checkpoint.config
    work.folder.mkdir(parents=True, exist_ok=True)
    calibrate_table(work, tick)
    first = _first_unfinished(work)
    if first == 0 and not work.file("residual", 0).exists():
        table = work.table()
        start_flow(
            work.file("residual", 0),
            config,
            work.calibration.tokens,
            lambda token: table.rows(token, token + 1),
        )
    for layer in config.layers[first:]:
        weights, source = (
            load_layer(work.checkpoint, layer.index),
            work.file("residual", layer.index),
        )
        path, size = work.file("layer", layer.index), 4 * sum(w.numel() for w in weights.values())
        if not path.exists():
            grams = observe_layer(source, config, layer, weights)
            tick(f"layer {layer.index}", size)
            write_tensors(path, _round_layer(work, weights, grams))
        if layer.index + 1 < len(config.kinds):
            rounded = rounded_layer(work, layer.index, weights)
            advance_flow(source, work.file("residual", layer.index + 1), config, layer, rounded)
        source.unlink()
        tick(f"layer {layer.index}", size)


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


def calibrate_table(work: Calibrator, tick: Tick) -> None:
    path, form = work.file("table"), work.formats()[TABLE]
    if path.exists():
        return
    rounding = work.recipe.rule(TABLE).rounding
    gram = _float_head_gram(work, tick) if rounding == "gptq" else None
    inputs = None if gram is None else prepare(gram, _TABLE_DAMPING)
    shape = work.checkpoint.config.tensor_shapes()[TABLE]

    def quantize(span: tuple[int, int]) -> dict[str, Tensor]:
        rows = work.checkpoint.rows(TABLE, *span)
        if form.is_float:
            return {TABLE: rows}
        if inputs is None:
            return named_parts(TABLE, round_rows(rows, form, rounding))
        return named_parts(TABLE, gptq(rows, inputs, form))

    blocks: list[dict[str, Tensor]] = list(in_order(quantize, row_blocks(shape)))
    write_tensors(path, {name: torch.cat([b[name] for b in blocks]) for name in blocks[0]})
    if not work.recipe.distilled:
        work.file("float", len(work.checkpoint.config.kinds)).unlink(missing_ok=True)


def float_flow(work: Calibrator, tick: Tick) -> Path:
    """The residuals of the float model after its last layer."""
    config, checkpoint = work.checkpoint.config, work.checkpoint
    count = len(config.kinds)
    last = work.file("float", count)
    if last.exists():
        return last
    if not any(work.file("float", i).exists() for i in range(count)):
        start_flow(
            work.file("float", 0),
            config,
            work.calibration.tokens,
            lambda token: checkpoint.rows(TABLE, token, token + 1),
        )
    first = max(i for i in range(count) if work.file("float", i).exists())
    for layer in config.layers[first:]:
        source = work.file("float", layer.index)
        weights = load_layer(checkpoint, layer.index)
        advance_flow(source, work.file("float", layer.index + 1), config, layer, weights)
        source.unlink()
        tick(f"layer {layer.index}, float", 4 * sum(w.numel() for w in weights.values()))
    return last


def _float_head_gram(work: Calibrator, tick: Tick) -> Tensor:
    config = work.checkpoint.config
    last = float_flow(work, tick)
    name = norm_before(config, len(config.kinds))
    gain = work.checkpoint.rows(name, 0, config.hidden_size)
    gram = torch.zeros(config.hidden_size, config.hidden_size)
    count = 0
    for rows in head_inputs(last, config, gain):
        gram.addmm_(rows.T, rows)
        count += len(rows)
    return gram / count
