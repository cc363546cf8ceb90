"""Files of what a text is between two layers of a model that has one layer in memory at a time.

That is the residual. Some layers read more: their part of the per-layer embeddings, which are
computed once, and keys and values of an earlier layer whose cache they share.

B sequences, T tokens, M width, P columns of a layer's per-layer embeddings, K kv heads, D head
size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_export import shards
from gemma_export.computing import CPU
from gemma_export.device import grain
from gemma_export.formats.safetensors import SafetensorsFile, SafetensorsWriter
from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.config import (
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    TABLE,
    GemmaConfig,
    LayerSpec,
)
from gemma_export.model.decoder import per_layer_parts
from gemma_export.model.ops import Weight
from gemma_export.parallel import in_order
from gemma_export.quantize.calibrate.layer_files import FlowFiles
from gemma_export.quantize.calibrate.layer_weights import short
from gemma_export.shards import Piece, Share
from gemma_runtime.formats.safetensors import TensorInfo
from gemma_runtime.staging import staged_file

RESIDUAL, KEYS, VALUES = "residual", "keys", "values"
_KINDS = {torch.uint8: "U8", torch.int32: "I32", torch.float16: "F16", torch.float32: "F32"}
KeysValues = tuple[Tensor, Tensor]  # (B, K, T, D) each, keys after rope
_SEQUENCES = "sequences"  # of the whole text, in the metadata of files with a share of its rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences [start, stop) of a rank's share, all of one piece."""

    piece: Piece
    start: int
    stop: int

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.stop


def all_of(sequences: range) -> range:
    return sequences


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a layer reads of some sequences, or the gradients with respect to that."""

    x: Tensor  # (B, T, M), the residual
    part: Tensor | None = None  # (B, T, P), its part of the per-layer embeddings
    lent: KeysValues | None = None  # of the layer whose cache it shares

    def tracked(self) -> "LayerInputs":
        """Copies that collect gradients."""
        return self._each(lambda x: x.detach().requires_grad_())

    def gradients(self) -> "LayerInputs":
        """The gradients of a tracked copy; 0 where nothing was read."""
        return self._each(lambda x: torch.zeros_like(x) if x.grad is None else x.grad)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "LayerInputs":
        part = None if self.part is None else change(self.part)
        lent = None if self.lent is None else (change(self.lent[0]), change(self.lent[1]))
        return LayerInputs(change(self.x), part, lent)


def joined(batches: Sequence[LayerInputs]) -> LayerInputs:
    """Those of all batches together."""
    parts = [one.part for one in batches if one.part is not None]
    lent = [one.lent for one in batches if one.lent is not None]
    return LayerInputs(
        torch.cat([one.x for one in batches]),
        torch.cat(parts) if parts else None,
        (torch.cat([k for k, _ in lent]), torch.cat([v for _, v in lent])) if lent else None,
    )


def embed(
    config: GemmaConfig, tokens: Tensor, weight: Callable[[str], Weight]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first residual (B, T, M) of tokens (B, T), and their per-layer embeddings by layer,
    (B, T, P) each; none without them. Reads only these rows of the tables.

    All is where the tokens are, except for the tables' weights.
    """
    ops = BatchOps(tokens, config.rms_norm_eps)
    x = ops.embed(weight(TABLE), config.embed_scale)
    if not config.per_layer:
        return x, ()
    parts = per_layer_parts(ops, config, weight, x)
    return x, parts.chunk(len(config.kinds), -1)


def embedding_weights(
    config: GemmaConfig, weight: Callable[[str], Weight], device: torch.device = CPU
) -> Callable[[str], Weight]:
    """The weights that `embed` reads: tables row by row, the others in the device's memory."""
    names = (PER_LAYER_PROJECTION, PER_LAYER_NORM) if config.per_layer else ()
    read = {name: weight(name) for name in names}
    values = {name: one.rows(0, one.shape[0]).to(device) for name, one in read.items()}
    held = hold(short(values))
    return lambda name: held[name] if name in held else weight(name)


def start_flow(
    files: FlowFiles, config: GemmaConfig, tokens: Tensor, weight: Callable[[str], Weight]
) -> None:
    """Embed this rank's share of tokens (B, T); writes the first residual, and the per-layer
    embeddings.
    """
    share = Share(len(tokens))
    tokens = tokens[share.own.start : share.own.stop]
    count, length = tokens.shape
    weights = embedding_weights(config, weight, files.device)
    layers = range(len(config.kinds))

    def run(index: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.inference_mode():
            return embed(config, tokens[index : index + 1].to(files.device), weights)

    layout = {_part(index): (count, length, config.per_layer) for index in layers}
    with ExitStack() as stack:
        shape = (count, length, config.hidden_size)
        write = stack.enter_context(_rows(files[0], {RESIDUAL: shape}, share))
        write_parts = (
            stack.enter_context(_rows(files.parts, layout, share)) if config.per_layer else None
        )
        for x, parts in in_order(run, range(count)):
            write({RESIDUAL: x})
            if write_parts is not None:
                write_parts({_part(index): part for index, part in enumerate(parts)})


class FlowReader:
    """Reads what a layer needs of this rank's share of a text."""

    def __init__(self, files: FlowFiles, config: GemmaConfig, layer: LayerSpec) -> None:
        self._config, self._layer = config, layer
        self._device = files.device
        self._residuals = self._open(files[layer.index])
        self._parts = self._open(files.parts) if config.per_layer else None
        self._lent = None if layer.owns_cache else self._open(files.lent(layer.source))
        self.share = read_share(self._residuals)
        _, self.length, _ = self._residuals.tensors[RESIDUAL].shape

    def read(self, start: int, stop: int) -> LayerInputs:
        """Sequences [start, stop)."""
        part = lent = None
        if self._parts is not None:
            part = self._parts.rows(_part(self._layer.index), start, stop)
        if self._lent is not None:
            lent = self._lent.rows(KEYS, start, stop), self._lent.rows(VALUES, start, stop)
        return LayerInputs(self._residuals.rows(RESIDUAL, start, stop), part, lent)

    def batches(self, choose: Callable[[range], range] = all_of) -> list[Batch]:
        """Batches of each piece's sequences, or of those that are chosen of them."""
        return batches(self._config, self.length, self.share, self._device, choose)

    def _open(self, path: Path) -> SafetensorsFile:
        return SafetensorsFile(path, self._device)


@contextmanager
def next_flow(
    files: FlowFiles, config: GemmaConfig, layer: LayerSpec
) -> Iterator[Callable[[Tensor, KeysValues | None], None]]:
    """Writes the residual after a layer, and its keys and values if it lends them.

    Gives a function that takes both of the next sequences.
    """
    before = SafetensorsFile(files[layer.index])
    share = read_share(before)
    count, length, width = before.tensors[RESIDUAL].shape
    with ExitStack() as stack:
        # The residual tells that the layer is done, so it is completed last.
        shape = (count, length, width)
        write = stack.enter_context(_rows(files[layer.index + 1], {RESIDUAL: shape}, share))
        lend: Callable[[Mapping[str, Tensor]], None] | None = None
        if layer.index in config.lenders:
            each = (count, layer.kv_heads, length, layer.head_dim)
            path = files.lent(layer.index)
            lend = stack.enter_context(_rows(path, {KEYS: each, VALUES: each}, share))

        def write_both(x: Tensor, lent: KeysValues | None) -> None:
            write({RESIDUAL: x})
            if lend is not None:
                assert lent is not None
                lend(dict(zip((KEYS, VALUES), lent, strict=True)))

        yield write_both


def batches(
    config: GemmaConfig,
    length: int,
    share: Share,
    device: torch.device,
    choose: Callable[[range], range] = all_of,
) -> list[Batch]:
    """Batches of sequences of this length; none reaches into another piece."""
    return split(share, max(1, grain(device.type).batch // (length * config.widest_ffn)), choose)


def split(share: Share, step: int, choose: Callable[[range], range] = all_of) -> list[Batch]:
    """Batches of at most `step` sequences."""
    return [
        Batch(piece, i, min(chosen.stop, i + step))
        for piece in share.pieces
        for chosen in (choose(piece.sequences),)
        for i in chosen[::step]
    ]


def read_share(file: SafetensorsFile) -> Share:
    """Of the text whose rows a file has."""
    return Share(int(file.metadata[_SEQUENCES]))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a safetensors file, completely or not at all."""
    layout = {n: TensorInfo(_KINDS[t.dtype], tuple(t.shape)) for n, t in tensors.items()}
    with staged_file(path) as partial, SafetensorsWriter(partial, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write_rows(name, 0, _bytes(tensor))


def write_rows(path: Path, tensors: Mapping[str, Tensor], share: Share) -> None:
    """Like `write_tensors`, of this rank's share of a text."""
    write_tensors(path, tensors, {_SEQUENCES: str(share.count)})


def write_shared(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Like `write_tensors`, once for all ranks, which wait for it."""
    shards.from_first(lambda: write_tensors(path, tensors))


@contextmanager
def _rows(
    path: Path, shapes: Mapping[str, tuple[int, ...]], share: Share
) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """Writes float32 tensors of these shapes; gives a function that takes the next rows of each."""
    layout, start = {name: TensorInfo("F32", shape) for name, shape in shapes.items()}, 0
    metadata = {_SEQUENCES: str(share.count)}
    with staged_file(path) as partial, SafetensorsWriter(partial, layout, metadata) as writer:

        def write(tensors: Mapping[str, Tensor]) -> None:
            nonlocal start
            for name, rows in tensors.items():
                writer.write_rows(name, start, _bytes(rows))
                end = start + len(rows)
            start = end

        yield write


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    content: NDArray[np.uint8] = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return content


def _part(index: int) -> str:
    return f"part.{index}"
