"""Measures the scales of int8 caches: how large each channel of keys and values gets.

The stored weights run over calibration text, layer by layer, because they are what fills the
caches. A key's scale is the channel's largest key / 127, so nothing in the text is clipped.

Keys are cached after rope, which turns pairs of channels by an angle that grows with the position.
The sequences of the text are short, so each key is bounded for every position of the context: by
its values at the first and the last position, and by the pair's length if the turn passes an axis.
Only the first token stays at its position.

Attention adds up values with the weights a, so their errors e add up to a variance of Σ a² e². The
scale of a channel of values minimizes that. The first token counts most: it gets much attention,
and its values, which are the same in every prompt, are often smaller than a step. Of a cache that
several layers read, the attention of all of them counts.

B sequences, T tokens, K kv heads, D head size.
"""

from collections.abc import Sequence
from math import pi
from pathlib import Path

import torch
from torch import Tensor

from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.memory import release_memory
from gemma_export.model.batch_ops import CachingOps
from gemma_export.model.config import GemmaConfig, LayerSpec
from gemma_export.model.int8_cache import MOST, LayerScales, round_cached
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.flow import KEYS, VALUES, start_flow, write_tensors
from gemma_export.quantize.calibrate.layer_files import FlowFiles, LayerFiles
from gemma_export.quantize.calibrate.layer_weights import (
    largest_layer,
    layer_bytes,
    load_stored_layer,
)
from gemma_export.quantize.calibrate.stream import cached_flow
from gemma_export.quantize.calibrate.text import LENGTH
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.store import QuantizedStore
from gemma_runtime.backends.rope import rope_angles
from gemma_runtime.manifest import Rope

SEQUENCES = 16  # of the text; more clip less, and make all steps coarser
_SHARES = tuple(0.4 + 0.03 * i for i in range(26))  # of the largest value that the range covers
_COPIES = 8  # of a layer's keys and values while their ranges are computed
_LEAST, _DEAD = 1e-20, 1.0  # a channel below the least is as good as 0, and gets any scale
_ATTENTION = "attention"


def measure_caches(work: Workspace, store: QuantizedStore, context: int, tick: Tick) -> None:
    """Write `cache_scales`, a file per layer, for caches of a context. Resumes after the last.

    `store` has the weights of the workspace's recipe.
    """
    config, residuals = work.checkpoint.config, work.cache_residuals(context)
    files = work.cache_scales(context)
    if files.last.exists():
        return
    if residuals.lowest() is None:
        tokens = work.calibration.first(SEQUENCES).tokens
        start_flow(residuals, config, tokens, store.weight)
    for layer in config.layers[residuals.lowest() :]:
        weights = load_stored_layer(store, config, layer.index, work.device)
        seen = cached_flow(residuals, config, layer, weights)
        _write_scales(files, residuals, config, layer, seen, context)
        residuals[layer.index].unlink()
        del seen
        release_memory()
        tick(f"layer {layer.index}", layer_bytes(config))
    residuals.delete()


def _write_scales(
    files: LayerFiles,
    residuals: FlowFiles,
    config: GemmaConfig,
    layer: LayerSpec,
    seen: Sequence[CachingOps],
    context: int,
) -> None:
    """Write a layer's scales, or its attention to a cache that it shares.

    Values that several layers read get their scales after the last of them.
    """
    tensors = {_ATTENTION: torch.cat([ops.attention for ops in seen])}
    if layer.owns_cache:
        keys = torch.cat([ops.keys for ops in seen if ops.keys is not None])
        tensors[KEYS] = _scales(largest_keys(keys, layer.rope, context))
    readers = [one.index for one in config.layers if one.source == layer.source]
    if layer.index == readers[-1]:
        attention = tensors[_ATTENTION]
        for index in readers[:-1]:
            attention += _read(files[index], _ATTENTION).to(attention.device)
        tensors[VALUES] = value_scales(_values(residuals, layer, seen), attention)
    write_tensors(files[layer.index], tensors)


def _values(residuals: FlowFiles, layer: LayerSpec, seen: Sequence[CachingOps]) -> Tensor:
    """The values (B, K, T, D) that a layer attends to."""
    if layer.owns_cache:
        return torch.cat([ops.values for ops in seen if ops.values is not None])
    return _read(residuals.lent(layer.source), VALUES).to(residuals.device)


def _read(path: Path, name: str) -> Tensor:
    file = SafetensorsFile(path)
    return file.rows(name, 0, file.tensors[name].shape[0])


def measured_bytes(work: Workspace, context: int) -> int:
    """Progress units left: bytes of layers."""
    config = work.checkpoint.config
    if work.cache_scales(context).last.exists():
        return 0
    return (len(config.kinds) - (work.cache_residuals(context).lowest() or 0)) * layer_bytes(config)


def measured_scales(work: Workspace, context: int) -> list[LayerScales]:
    """The scales of the cache that each layer reads, once `measure_caches` has run."""
    files, layers = work.cache_scales(context), work.checkpoint.config.layers
    last = {layer.source: layer.index for layer in layers}
    return [
        LayerScales(_read(files[layer.source], KEYS), _read(files[last[layer.source]], VALUES))
        for layer in layers
    ]


def measuring_peak_bytes(config: GemmaConfig) -> int:
    """Upper bound of the memory that measuring takes, in bytes, without a batch."""
    widest = max(layer.kv_heads * layer.head_dim for layer in config.layers)
    return 4 * (largest_layer(config) + _COPIES * 2 * SEQUENCES * LENGTH * widest)


def largest_keys(keys: Tensor, rope: Rope, context: int) -> Tensor:
    """The largest |key| of each channel, (K, D), at any position below `context`.

    Keys before rope, (B, K, T, D), become r cos(phase + angle) in the lower half of the channels
    and r sin(phase + angle) in the upper one.
    """
    low, high = keys.chunk(2, -1)  # (B, K, T, D / 2)
    angles = rope_angles(rope, [context - 1], keys.shape[-1])
    turn = torch.from_numpy(angles).float().to(keys.device)  # (1, D / 2)
    length, phase = torch.hypot(low, high), torch.atan2(high, low)
    turned = torch.cat([length * _largest_cosine(phase - lag, turn) for lag in (0, pi / 2)], -1)
    turned[:, :, 0] = keys[:, :, 0].abs()  # <bos> is always at position 0
    return _largest(turned)


def value_scales(values: Tensor, attention: Tensor) -> Tensor:
    """The scales (K, D) of values (B, K, T, D) that lose least where attention (B, K, T) is."""
    largest, weights = _largest(values), attention[..., None]
    best = _scales(largest)
    least = torch.full_like(best, torch.inf)
    for share in _SHARES:
        scales = _scales(largest * share)
        lost = round_cached(values, scales).sub_(values).square_().mul_(weights).sum((0, 2))
        best = torch.where(lost < least, scales, best)
        least = torch.minimum(lost, least)
    return best


def _largest_cosine(phase: Tensor, turn: Tensor) -> Tensor:
    """The largest |cos(phase + angle)| for angles from 0 to `turn`: 1 at multiples of π."""
    end = phase + turn
    passes = (end / pi).floor() != (phase / pi).floor()
    return torch.where(passes, 1.0, torch.maximum(phase.cos().abs(), end.cos().abs()))


def _largest(x: Tensor) -> Tensor:
    """(B, K, T, D) → (K, D): the largest |x| of each channel."""
    return x.abs().amax((0, 2))


def _scales(largest: Tensor) -> Tensor:
    return torch.where(largest > _LEAST, largest / MOST, _DEAD)
