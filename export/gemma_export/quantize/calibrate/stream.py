"""Runs calibration sequences through the model with one layer at a time in memory.

Residuals between layers are stored in files. Interrupted work resumes after the last finished
layer. B sequences, T tokens, M width.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.formats.safetensors import SafetensorsFile, SafetensorsWriter
from gemma_export.model.batch_ops import (
    BatchOps,
    CachingOps,
    HeldWeight,
    ObservingOps,
    hold,
    product_dtype,
)
from gemma_export.model.config import TABLE, GemmaConfig, LayerSpec
from gemma_export.model.decoder import decoder_layer, norm_before
from gemma_export.model.ops import Weight, lookup_scale
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.workspace import LayerFiles, Workspace
from gemma_export.quantize.store import QuantizedStore
from gemma_runtime.formats.safetensors import TensorInfo
from gemma_runtime.staging import staged_file

RESIDUAL = "residual"
_BATCH_ELEMENTS = 1 << 20  # most elements of a batch's widest activation
_ALL = slice(None)
_SIDE = 256  # rows of a block of a Gram matrix
_KINDS = {torch.uint8: "U8", torch.int32: "I32", torch.float16: "F16", torch.float32: "F32"}


def layer_names(config: GemmaConfig, index: int) -> list[str]:
    return [name for name in config.tensor_shapes() if name.startswith(f"model.layers.{index}.")]


def layer_bytes(config: GemmaConfig) -> int:
    """Average bytes of a layer in float32."""
    return (4 * config.parameters - outer_bytes(config)) // len(config.kinds)


def outer_bytes(config: GemmaConfig) -> int:
    """Bytes in float32 of the table, and of the head if it is another matrix."""
    return 4 * config.vocab_size * config.hidden_size * len(config.tables)


def load_layer(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """A layer's float32 weights, and the gain of the norm after it."""
    return _load_layer(checkpoint.config, index, checkpoint.rows)


def load_stored_layer(store: QuantizedStore, config: GemmaConfig, index: int) -> dict[str, Tensor]:
    """Like `load_layer`, from the store: dequantized weights."""
    return _load_layer(config, index, lambda name, *span: store.weight(name).rows(*span))


def _load_layer(
    config: GemmaConfig, index: int, rows: Callable[[str, int, int], Tensor]
) -> dict[str, Tensor]:
    shapes = config.tensor_shapes()
    names = [*layer_names(config, index), norm_before(config, index + 1)]
    return {name: rows(name, 0, shapes[name][0]) for name in names}


def short(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in the dtype used for matrix products; gains unchanged."""
    return {n: w.to(product_dtype()) if w.dim() == 2 else w for n, w in weights.items()}


def pass_layers(
    work: Workspace,
    files: LayerFiles,
    tick: Tick,
    sequences: int | None = None,
    *,
    keep: bool = False,
) -> None:
    """Run all sequences, or the first, through the float model; writes residuals between layers.

    Resumes after the newest file. Deletes older files unless `keep` is set.
    """
    config, checkpoint = work.checkpoint.config, work.checkpoint
    first = files.highest()
    if first is None:
        first, tokens = 0, work.calibration.tokens[:sequences]
        shape = config.tensor_shapes()[TABLE]
        table = SourceWeight(TABLE, shape, checkpoint, work.table_factors)
        start_flow(files[0], config, tokens, table)
    for layer in config.layers[first:]:
        source, weights = files[layer.index], load_layer(checkpoint, layer.index)
        advance_flow(source, files[layer.index + 1], config, layer, weights)
        if not keep:
            source.unlink()
        tick(f"layer {layer.index}, float", 4 * sum(w.numel() for w in weights.values()))


def start_flow(path: Path, config: GemmaConfig, tokens: Tensor, table: Weight) -> None:
    """Embed the tokens and write them as the first residual."""
    parts = (embed_sequence(config, ids, table) for ids in tokens)
    _write_flow(path, (*tokens.shape, config.hidden_size), parts)


def embed_sequence(config: GemmaConfig, tokens: Tensor, table: Weight) -> Tensor:
    """(T,) ids → (1, T, M). Reads only these rows of the table."""
    rows = torch.cat([table.rows(token, token + 1) for token in tokens.tolist()])
    return rows[None] * lookup_scale(table, config.embed_scale)


def advance_flow(
    source: Path, path: Path, config: GemmaConfig, layer: LayerSpec, weights: Mapping[str, Tensor]
) -> None:
    """Run all residuals through one layer."""
    file, held = SafetensorsFile(source), hold(short(weights))

    def run(span: tuple[int, int]) -> Tensor:
        x = file.rows(RESIDUAL, *span)
        with torch.inference_mode():
            ops = BatchOps(torch.empty(x.shape[:2]), config.rms_norm_eps)
            return run_layer(ops, config, layer, held, x)

    _write_flow(path, file.tensors[RESIDUAL].shape, in_order(run, batches(config, file)))


def sample_flow(
    source: Path,
    path: Path,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
    positions: int,
) -> dict[str, Tensor]:
    """Like `advance_flow`; returns about `positions` inputs (P, K) of matrices, none of bos.

    Of matrices with the same inputs, only the first is in the result.
    """
    file, held = SafetensorsFile(source), hold(short(weights))
    count = file.tensors[RESIDUAL].shape[0]
    samples: dict[str, list[Tensor]] = {}

    def run(span: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        y, seen = _observe(file, config, layer, held, span)
        return y, {
            name: sample_positions(rows.view(*y.shape[:2], -1), count, positions).clone()
            for name, rows in _distinct(seen)
        }

    def outputs() -> Iterator[Tensor]:
        for y, seen in in_order(run, batches(config, file)):
            for name, rows in seen.items():
                samples.setdefault(name, []).append(rows)
            yield y

    _write_flow(path, file.tensors[RESIDUAL].shape, outputs())
    return {name: torch.cat(rows) for name, rows in samples.items()}


def cached_flow(
    source: Path,
    path: Path,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `advance_flow`; returns keys, values and attention as `CachingOps` records them."""
    file, held = SafetensorsFile(source), hold(short(weights))
    seen: list[CachingOps] = []

    def run(span: tuple[int, int]) -> tuple[Tensor, CachingOps]:
        x = file.rows(RESIDUAL, *span)
        with torch.inference_mode():
            ops = CachingOps(torch.empty(x.shape[:2]), config.rms_norm_eps)
            return run_layer(ops, config, layer, held, x), ops

    def outputs() -> Iterator[Tensor]:
        for y, ops in in_order(run, batches(config, file)):
            seen.append(ops)
            yield y

    _write_flow(path, file.tensors[RESIDUAL].shape, outputs())
    parts = zip(*((ops.keys, ops.values, ops.attention) for ops in seen), strict=True)
    keys, values, attention = map(torch.cat, parts)
    return keys, values, attention


def sample_positions(rows: Tensor, count: int, positions: int) -> Tensor:
    """Of (B, T, K), a batch of `count` sequences: its share (P, K) of `positions`, none of bos."""
    every = -(-count * (rows.shape[1] - 1) // positions)
    return rows[:, 1:].flatten(0, 1)[::every]


def observe_layer(
    source: Path,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, Tensor],
    sequences: slice = _ALL,
) -> dict[str, Tensor]:
    """The Gram matrix E[x xᵀ] of each matrix's inputs, (K, K). Shared inputs share a tensor."""
    file, held = SafetensorsFile(source), hold(short(weights))
    count, length, _ = file.tensors[RESIDUAL].shape
    chosen = range(count)[sequences]

    def run(span: tuple[int, int]) -> dict[str, Tensor]:
        return _observe(file, config, layer, held, span)[1]

    grams: dict[str, Tensor] = {}
    for seen in in_order(run, batches(config, file, chosen)):
        for first, rows in _distinct(seen):  # in one thread, so a wide Gram matrix exists only once
            if first not in grams:
                grams[first] = torch.zeros(rows.shape[1], rows.shape[1])
            _add_upper(grams[first], rows)
        shared = {name: _owner(seen, name) for name in seen}
    for gram in grams.values():
        _mirror(gram).div_(len(chosen) * length)
    return {name: grams[first] for name, first in shared.items()}


def _observe(
    file: SafetensorsFile,
    config: GemmaConfig,
    layer: LayerSpec,
    weights: Mapping[str, HeldWeight],
    span: tuple[int, int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run sequences [start, stop) through a layer; returns the residuals, and each matrix's inputs
    (B · T, K).
    """
    x = file.rows(RESIDUAL, *span)
    seen: dict[str, Tensor] = {}
    with torch.inference_mode():
        ops = ObservingOps(torch.empty(x.shape[:2]), config.rms_norm_eps, seen)
        return run_layer(ops, config, layer, weights, x), seen


def _add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add Σ x xᵀ over rows, only to blocks on and above the diagonal."""
    for start in range(0, len(gram), _SIDE):
        stop = start + _SIDE
        gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def _mirror(gram: Tensor) -> Tensor:
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
    x: Tensor,
) -> Tensor:
    """Residual (B, T, M) → residual after the layer."""
    h = ops.norm(x, weights[norm_before(config, layer.index)])
    return decoder_layer(ops, config, layer, weights.__getitem__, x, h)[0]


def batches(
    config: GemmaConfig, file: SafetensorsFile, chosen: range | None = None
) -> Iterator[tuple[int, int]]:
    """Spans [start, stop) of batches of all sequences, or of the chosen ones."""
    count, length, _ = file.tensors[RESIDUAL].shape
    sequences = range(count) if chosen is None else chosen
    step = max(1, _BATCH_ELEMENTS // (length * config.intermediate_size))
    return ((i, min(sequences.stop, i + step)) for i in sequences[::step])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, completely or not at all."""
    layout = {n: TensorInfo(_KINDS[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    with staged_file(path) as partial, SafetensorsWriter(partial, layout, {}) as writer:
        for name, tensor in tensors.items():
            writer.write_rows(name, 0, tensor.contiguous().view(torch.uint8).numpy())


def _write_flow(path: Path, shape: tuple[int, ...], parts: Iterator[Tensor]) -> None:
    layout = {RESIDUAL: TensorInfo("F32", shape)}
    with staged_file(path) as partial, SafetensorsWriter(partial, layout, {}) as writer:
        start = 0
        for part in parts:
            writer.write_rows(RESIDUAL, start, part.contiguous().view(torch.uint8).numpy())
            start += len(part)


def _distinct(seen: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, rows) for name, rows in seen.items() if _owner(seen, name) == name)


def _owner(seen: Mapping[str, Tensor], name: str) -> str:
    """The first weight with the same input."""
    return next(first for first, rows in seen.items() if rows is seen[name])
