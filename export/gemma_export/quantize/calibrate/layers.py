"""Calibrated rounding: first table and head, then layer by layer.

Each layer is rounded for the output of the rounded layers before it. Memory holds one layer and the
Gram matrices of its inputs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.device import grain
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.format import Format
from gemma_export.memory import release_memory
from gemma_export.model.batch_ops import BatchOps
from gemma_export.model.config import (
    PER_LAYER_PROJECTION,
    TABLE,
    TABLE_FACTORS,
    GemmaConfig,
    LayerSpec,
)
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.balance import balanced, balancing_factors
from gemma_export.quantize.calibrate.flow import start_flow, write_shared
from gemma_export.quantize.calibrate.gptq import gptq, prepare
from gemma_export.quantize.calibrate.layer_weights import layer_bytes, load_layer
from gemma_export.quantize.calibrate.split import TableInputs, prepare_table
from gemma_export.quantize.calibrate.stream import (
    add_gram,
    advance_flow,
    mirror,
    observe_layer,
)
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import Recipe
from gemma_export.quantize.round import check_reach, round_rows, round_weighted
from gemma_export.quantize.store import StoredWeight, named_parts, round_pieces
from gemma_export.shards import Share, Sums

FACTORS = "factors"  # of a matrix's columns, stored next to its codes
SEQUENCES = 384  # used to round layers; more change little


def outer_matrices(config: GemmaConfig, recipe: Recipe) -> list[str]:
    """The matrices outside the layers that are rounded by text: table, head, and if the recipe says
    so the projection of per-layer embeddings.
    """
    if not recipe.rounds_by_text:
        return []
    more = [PER_LAYER_PROJECTION] if config.per_layer else []
    return [*config.tables, *(name for name in more if recipe.rule(name).rounding == "gptq")]


def calibrate_table(work: Workspace, tick: Tick) -> None:
    """Round the outer matrices, the table first; write a file for each.

    If table or head are rounded by text, `smooth` or `weigh_table` must have run: a smooth or
    weighted head is rounded for its inputs, another for their curvature, with the channels in its
    order.
    """
    for name in outer_matrices(work.checkpoint.config, work.recipe):
        if not shards.from_first(work.rounded_table(name).exists):
            _calibrate_rows(work, name, tick)


def _rounding(work: Workspace, name: str, fmt: Format) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function that rounds rows of an outer matrix; to nearest if the text says nothing of it."""
    rounding = work.recipe.rule(name).rounding
    if rounding == "gptq" and name == PER_LAYER_PROJECTION:
        return TableInputs(name, fmt, prepare(_embedding_gram(work))).round
    if rounding in ("gptq", "weighted") and not fmt.is_float:
        curvature = work.curvature(name)
        if curvature is None:
            rounding = "nearest"
        elif rounding == "gptq":
            return prepare_table(name, curvature, fmt).round
        else:
            return partial(_weighted, name, fmt, curvature.diagonal())
    return lambda values: round_pieces(name, values, fmt, rounding)


def _weighted(name: str, fmt: Format, power: Tensor, values: Tensor) -> dict[str, Tensor]:
    check_reach(name, values, fmt)
    return named_parts(name, round_weighted(values, fmt, power))


def _embedding_gram(work: Workspace) -> Tensor:
    """The Gram matrix (M, M) of embeddings from the rounded table."""
    config, tokens = work.checkpoint.config, work.calibration.tokens[:SEQUENCES]
    share, table, sums = Share(len(tokens)), work.table(), Sums()
    own = tokens[share.own.start : share.own.stop].to(work.device)
    for piece in share.pieces:
        gram = torch.zeros(config.hidden_size, config.hidden_size, device=work.device)
        for row in own[piece.sequences.start : piece.sequences.stop]:
            x = BatchOps(row, config.rms_norm_eps).embed(table, config.embed_scale)  # (T, M)
            add_gram(gram, x)
        sums.of(piece)[TABLE] = gram
    return mirror(sums.total()[TABLE]).div_(tokens.numel())


def _calibrate_rows(work: Workspace, name: str, tick: Tick) -> None:
    fmt = work.formats()[name]
    shape = work.checkpoint.config.tensor_shapes()[name]
    rounded = _rounding(work, name, fmt)

    def quantize(span: tuple[int, int]) -> dict[str, Tensor]:
        values = work.rows(name, *span)
        return {name: values} if fmt.is_float else rounded(values)

    spans = list(row_blocks(shape, grain(work.device.type).table_rows))
    blocks: list[dict[str, Tensor]] = []
    for span, block in zip(spans, shards.dealt(quantize, spans), strict=True):
        blocks.append(block)
        tick(f"rows from {span[0]}", 4 * (span[1] - span[0]) * shape[1])
    parts = {part: torch.cat([b[part] for b in blocks]) for part in blocks[0]}
    if name == TABLE and (factors := work.table_factors) is not None:
        parts[TABLE_FACTORS] = factors
    write_shared(work.rounded_table(name), parts)


def table_bytes(work: Workspace) -> int:
    """Progress units: bytes of the outer matrices in float32."""
    shapes = work.checkpoint.config.tensor_shapes()
    return sum(
        4 * prod(shapes[name]) for name in outer_matrices(work.checkpoint.config, work.recipe)
    )


def calibrate(work: Workspace, tick: Tick) -> None:
    """Round the matrices of all layers and write one file per layer. Skips finished layers.

    The table must be rounded, because layers are rounded for its output.
    """
    config = work.checkpoint.config
    first = shards.resumed_at(_first_unfinished(work), min)
    if first is None:
        first = 0
        tokens = work.calibration.tokens[:SEQUENCES]
        start_flow(work.residuals, config, tokens, work.rounded)
    for layer in config.layers[first:]:
        weights = load_layer(work.checkpoint, layer.index, work.device)
        path, size = work.rounded_layers[layer.index], 4 * sum(w.numel() for w in weights.values())
        if not shards.from_first(path.exists):
            grams = observe_layer(work.residuals, config, layer, weights)
            release_memory()  # fragments left by a layer would raise the next one's peak
            tick(f"layer {layer.index}", size)
            write_shared(path, _round_layer(work, layer, weights, grams))
            del grams
            release_memory()
        if layer.index + 1 < len(config.kinds):
            rounded = rounded_layer(work, layer.index, weights)
            advance_flow(work.residuals, config, layer, rounded)
        shards.wait()
        work.residuals[layer.index].unlink()
        tick(f"layer {layer.index}", size)


def calibrate_bytes(work: Workspace) -> int:
    """Progress units left: bytes of layers, once to observe and round, once to run."""
    config = work.checkpoint.config
    return 2 * (len(config.kinds) - (_first_unfinished(work) or 0)) * layer_bytes(config)


def rounded_layer(work: Workspace, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's weights after rounding: dequantized matrices, and those that stay float."""
    file, formats = work.open(work.rounded_layers[index]), work.formats()

    def read(name: str, values: Tensor) -> Tensor:
        if f"{name}.codes" in file.tensors:
            weight = StoredWeight(name, tuple(values.shape), formats[name], file)
            return weight.rows(0, len(values))
        return file.rows(name, 0, len(values)) if name in file.tensors else values

    return {name: read(name, values) for name, values in weights.items()}


def _first_unfinished(work: Workspace) -> int | None:
    """A layer is finished if the next one's residuals exist; the last, if it is rounded. None if
    there are no residuals.
    """
    if work.rounded_layers.last.exists():
        return len(work.checkpoint.config.kinds)
    return work.residuals.highest()


def _round_layer(
    work: Workspace, layer: LayerSpec, weights: Mapping[str, Tensor], grams: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Codes, column factors, and balanced gains. Divides the Gram matrices by the factors."""
    formats, recipe = work.formats(), work.recipe
    chosen = [
        name
        for name in grams
        if (rule := recipe.rule(name)).rounding == "gptq"
        and not rule.smooth  # those have factors already
        and not formats[name].is_float
    ]
    found = shards.from_first(lambda: balancing_factors(layer.index, weights, grams, chosen))
    factors = {name: values.to(work.device) for name, values in found.items()}
    divided: list[Tensor] = []
    for name, shared in factors.items():  # matrices with the same inputs share a Gram matrix
        if not any(grams[name] is gram for gram in divided):
            divided.append(grams[name].div_(shared[:, None]).div_(shared))

    def quantize(name: str) -> dict[str, Tensor]:
        fmt, rounding = formats[name], recipe.rule(name).rounding
        values = balanced(name, weights[name], factors)
        if fmt.is_float:
            return {name: values}
        check_reach(name, values, fmt)
        if rounding == "gptq":
            return named_parts(name, gptq(values, prepare(grams[name]), fmt))
        return named_parts(name, round_rows(values, fmt, rounding))

    tensors = {f"{name}.{FACTORS}": values for name, values in factors.items()}
    tensors |= {n: balanced(n, w, factors) for n, w in weights.items() if w.dim() == 1}
    for parts in shards.dealt(quantize, list(grams)):
        tensors |= parts
    return tensors
