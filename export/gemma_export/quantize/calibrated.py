"""Calibrated weights: runs calibration and distillation as a list of stages.

Each stage writes files of the `Workspace`. Existing files are not computed again, so interrupted
work resumes after its last file.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path

from torch import Tensor

from gemma_export import shards
from gemma_export.computing import computing
from gemma_export.device import HOST, grain
from gemma_export.formats.codes import Codes
from gemma_export.formats.format import FLOAT, INT8_PIECE, Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.memory import kept_memory
from gemma_export.model.config import TABLE, TABLE_FACTORS, GemmaConfig
from gemma_export.model.decoder import norm_before
from gemma_export.progress import Note, Stage, Tick, silent
from gemma_export.quantize.calibrate.cache_scales import measuring_peak_bytes
from gemma_export.quantize.calibrate.curvature import loss_peak_bytes
from gemma_export.quantize.calibrate.fisher import (
    backward_bytes,
    information_peak_bytes,
    weigh_table,
)
from gemma_export.quantize.calibrate.layer_weights import largest_layer, layer_names
from gemma_export.quantize.calibrate.layers import (
    calibrate,
    calibrate_bytes,
    calibrate_table,
    outer_matrices,
    table_bytes,
)
from gemma_export.quantize.calibrate.smooth import smooth, smooth_bytes, smooth_peak_bytes
from gemma_export.quantize.calibrate.text import LENGTH
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.distill.candidates import CANDIDATES
from gemma_export.quantize.distill.distill import (
    BATCH,
    distill,
    distill_bytes,
    pass_teacher,
    teacher_bytes,
)
from gemma_export.quantize.recipe import Recipe
from gemma_export.quantize.store import round_span
from gemma_export.shards import HELD

_LIBRARIES = 768 << 20  # torch with its threads, and memory left over from parsing the tokenizer
_COPIES = 4  # of a matrix on its way to an accelerator: as read, in float32, rewritten
_LAYERS = "model.layers."
_DISTILLED = "distilled-3"  # increase it when distillation changes


@dataclass(frozen=True, slots=True)
class CalibrationStage:
    """A step of the work that writes files, and whose speed is uniform."""

    name: str
    run: Callable[[Workspace, Tick], None]
    is_done: Callable[[Workspace], bool]  # or not needed by the recipe
    bytes_left: Callable[[Workspace], int]  # progress units left: bytes of weights to be read


def _is_smoothed(work: Workspace) -> bool:
    return not work.recipe.observes_inputs or work.smoothing.last.exists()


def _is_ordered(work: Workspace) -> bool:
    return not weighs_table(work.recipe, work.checkpoint.config) or work.channel_order.exists()


def weighs_table(recipe: Recipe, config: GemmaConfig) -> bool:
    """Whether rounding needs the curvature of the table, and an order of the channels."""
    rules = [recipe.rule(name) for name in config.tables]
    return any(rule.rounding == "gptq" and not rule.smooth for rule in rules)


def _is_table_rounded(work: Workspace) -> bool:
    names = outer_matrices(work.checkpoint.config, work.recipe)
    return all(work.rounded_table(name).exists() for name in names)


def _are_layers_rounded(work: Workspace) -> bool:
    rounds = rounds_layers_by_text(work.recipe, work.formats())
    return not rounds or work.rounded_layers.last.exists()


def rounds_layers_by_text(recipe: Recipe, formats: Iterable[str]) -> bool:
    """Whether matrices of the layers, of all these, are rounded by what the model computes."""
    layers = (name for name in formats if name.startswith(_LAYERS))
    return recipe.distilled or any(recipe.rule(name).rounding == "gptq" for name in layers)


def _is_distilled(work: Workspace) -> bool:
    return not work.recipe.distilled or work.distilled_gain.exists()


# In order of execution. The first two find factors and an order of channels, which all others use.
STAGES = (
    CalibrationStage("smooth", smooth, _is_smoothed, smooth_bytes),
    CalibrationStage("channels", weigh_table, _is_ordered, backward_bytes),
    CalibrationStage("teacher", pass_teacher, _is_distilled, teacher_bytes),
    CalibrationStage("table", calibrate_table, _is_table_rounded, table_bytes),
    CalibrationStage("calibrate", calibrate, _are_layers_rounded, calibrate_bytes),
    CalibrationStage("distill", distill, _is_distilled, distill_bytes),
)


@dataclass(frozen=True)
class CalibratedWeights:
    """Calibrates on demand; the store reads its codes here."""

    work: Workspace
    stage: Stage
    note: Note = silent

    @property
    def key(self) -> str:
        return f"{self.work.key} {_DISTILLED}" if self.work.recipe.distilled else self.work.key

    def round_all(self) -> None:
        """Run the stages that are not done yet."""
        with self.work.locked(self.note):
            for stage in STAGES:
                shards.wait()  # none looks for files that the first is writing
                work = self.work.arranged()
                if not shards.from_first(partial(stage.is_done, work)):
                    bar = self.stage(stage.name, stage.bytes_left(work))
                    with kept_memory(), computing(work.device), bar as tick:
                        stage.run(work, tick)
            self.work.end_rounding()

    def parts(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        work = self._final
        parts = self._rounded(name, start, stop)
        if name == TABLE and start == 0 and (factors := work.table_factors) is not None:
            parts[TABLE_FACTORS] = factors  # all of them, together with the first rows
        return parts

    @cached_property
    def _final(self) -> Workspace:
        """The workspace of the model as it was rounded; reads the factors of all layers."""
        return self.work.arranged()

    @cached_property
    def _left(self) -> dict[str, Format]:
        """Formats of the tensors that the stages leave to be rounded without text."""
        config, formats = self.work.checkpoint.config, self.work.formats()
        layers = rounds_layers_by_text(self.work.recipe, formats)
        outer = outer_matrices(config, self.work.recipe)
        if self.work.recipe.distilled:
            outer.append(norm_before(config, len(config.kinds)))
        return {
            name: formats.get(name, FLOAT)
            for name in config.tensor_shapes()
            if not (layers if name.startswith(_LAYERS) else name in outer)
        }

    def _rounded(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        work = self._final
        if name in self._left:
            fmt = self._left[name]
            return round_span(name, (start, stop), work.checkpoint, fmt, work.recipe)
        file = SafetensorsFile(self._path(name))
        names = (f"{stem}.{part}" for stem in (name + INT8_PIECE, name) for part in Codes._fields)
        stored = [n for n in (name, *names) if n in file.tensors]
        return {n: file.rows(n, start, stop) for n in stored}

    def _path(self, name: str) -> Path:
        """The file that holds a tensor's final values."""
        work, distilled = self.work, self.work.recipe.distilled
        if layer := re.match(r"model\.layers\.(\d+)\.", name):
            return (work.distilled_layers if distilled else work.rounded_layers)[int(layer[1])]
        return work.rounded_table(name) if name in work.formats() else work.distilled_gain


def peak_bytes(
    config: GemmaConfig, recipe: Recipe, bits: float | None = None, kind: str = HOST
) -> int:
    """Upper bound of the host's memory that calibration on this kind of device takes, in bytes."""
    if kind == HOST:
        return _LIBRARIES + working_bytes(config, recipe, bits)
    return _LIBRARIES + _passing_bytes(config, recipe)


def working_bytes(
    config: GemmaConfig, recipe: Recipe, bits: float | None = None, kind: str = HOST
) -> int:
    """Upper bound of the device's memory that calibration takes, in bytes; of the host's, that is
    without the libraries.
    """
    measuring = 0 if bits is None else loss_peak_bytes(config, kind)
    if weighs_table(recipe, config):
        measuring = max(measuring, information_peak_bytes(config, kind))
    width, inputs, layer = config.hidden_size, config.widest_input, largest_layer(config)
    held, pieces = grain(kind).held, grain(kind)
    rounding = 4 * (4 * layer + 5 * inputs**2 + held * 8 * min(pieces.weights, inputs * width))
    table = held * 10 * 4 * pieces.table_rows * width + 5 * config.vocab_size * width // 4 * 2
    embedding, learning = _embedding_bytes(config, kind), 0
    if recipe.distilled:
        residuals = BATCH * LENGTH * (width + config.per_layer) * len(config.kinds)
        learning = embedding + 4 * (residuals + 3 * CANDIDATES * width)
        # Gradients of a layer, and sums of them; per thread, a matrix with its averages.
        learning += 4 * (layer * (1 + HELD + held) + held * 8 * inputs * width)
        # Logits of the candidates with their gradients, and the candidates in bfloat16.
        learning += held * CANDIDATES * (48 * LENGTH + 8 * width)
    smoothing = smooth_peak_bytes(config) if recipe.observes_inputs else 0
    working = _batch_bytes(config, kind) + max(rounding, learning, smoothing)
    return max(table, measuring, working, embedding)


def scales_peak_bytes(config: GemmaConfig, kind: str = HOST) -> int:
    """Upper bound of the host's memory that measuring the scales of int8 caches takes, in bytes."""
    on_host = scales_working_bytes(config) if kind == HOST else _COPIES * 4 * _largest(config)
    return _LIBRARIES + on_host


def scales_working_bytes(config: GemmaConfig, kind: str = HOST) -> int:
    """Upper bound of the device's memory that this takes, in bytes."""
    measuring = _batch_bytes(config, kind) + measuring_peak_bytes(config)
    return max(measuring, _embedding_bytes(config, kind))


def _passing_bytes(config: GemmaConfig, recipe: Recipe) -> int:
    """Bytes of the host through which weights pass to an accelerator: copies of the largest matrix
    of a layer, blocks of the table, and its codes on their way into a file.
    """
    table = 10 * 4 * grain(HOST).table_rows * config.hidden_size  # the search for its channels
    codes = 5 * config.vocab_size * config.hidden_size // 4
    return _COPIES * 4 * _largest(config) + (table + codes if recipe.rounds_by_text else 0)


def _largest(config: GemmaConfig) -> int:
    """Weights of the largest matrix of a layer."""
    shapes = config.tensor_shapes()
    return max(prod(shapes[n]) for layer in config.layers for n in layer_names(config, layer.index))


def _embedding_bytes(config: GemmaConfig, kind: str) -> int:
    """Bytes that computing per-layer embeddings takes: their projection, and copies per thread."""
    columns = config.per_layer * len(config.kinds)
    return 4 * columns * (2 * config.hidden_size + grain(kind).held * 6 * LENGTH)


def _batch_bytes(config: GemmaConfig, kind: str) -> int:
    """Bytes of the sequences that are run at once, in all threads."""
    pieces = grain(kind)
    elements = max(pieces.batch, LENGTH * config.widest_ffn)
    if kind != HOST:  # there, scores of many sequences are computed together
        elements += max(LENGTH, pieces.batch // config.widest_ffn) * config.heads * LENGTH
    return pieces.held * 16 * elements
