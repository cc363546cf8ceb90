"""What calibration and distillation leave, as the store wants it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gemma_export.formats.codes import Codes
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.memory import kept_memory
from gemma_export.model.config import TABLE, TABLE_FACTORS, GemmaConfig
from gemma_export.progress import Stage
from gemma_export.quantize.calibrate.curvature import loss_peak_bytes
from gemma_export.quantize.calibrate.fisher import information_peak_bytes, way_bytes
from gemma_export.quantize.calibrate.gptq import SLICE
from gemma_export.quantize.calibrate.layers import (
    TABLE_ROWS,
    calibrate,
    calibrate_bytes,
    calibrate_table,
    table_bytes,
    weigh_table,
)
from gemma_export.quantize.calibrate.stream import layer_bytes
from gemma_export.quantize.calibrate.text import LENGTH
from gemma_export.quantize.calibrate.workspace import Calibrator, pass_layers
from gemma_export.quantize.distill.candidates import CANDIDATES
from gemma_export.quantize.distill.distill import BATCH, distill, distill_bytes
from gemma_export.quantize.recipe import Recipe

_LIBRARIES = 768 << 20  # torch and its threads, and what parsing the tokenizer took
_DISTILLED = "distilled-2"  # raise it when what is learned changes


@dataclass(frozen=True, slots=True)
class CalibratedWeights:
    work: Calibrator
    stage: Stage

    @property
    def key(self) -> str:
        return f"{self.work.key} {_DISTILLED}" if self.work.recipe.distilled else self.work.key

    def round_all(self) -> None:
        """All that is not done yet, in stages each of which goes on at one speed."""
        work, config = self.work, self.work.checkpoint.config
        if work.recipe.rule(TABLE).rounding == "gptq" and not work.file("order").exists():
            with kept_memory(), self.stage("channels", way_bytes(work)) as tick:
                weigh_table(work, tick)
        work = work.arranged()
        learns = work.recipe.distilled and not work.file("final").exists()
        if learns:
            layers = len(config.kinds) * layer_bytes(config)
            with kept_memory(), self.stage("teacher", layers) as tick:
                pass_layers(work, tick, "float")
        with kept_memory(), self.stage("table", table_bytes(work)) as tick:
            calibrate_table(work, tick)
        with kept_memory(), self.stage("calibrate", calibrate_bytes(work)) as tick:
            calibrate(work, tick)
        if learns:
            with kept_memory(), self.stage("distill", distill_bytes(work)) as tick:
                distill(work, tick)
        work.file("float", len(config.kinds)).unlink(missing_ok=True)  # large, and of no more use

    def parts(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        file = self._file(name)
        names = (f"{stem}.{part}" for stem in (f"{name}.fine", name) for part in Codes._fields)
        found = [n for n in (name, *names) if n in file.tensors]
        if not found:  # a gain that nothing learned
            return {name: self.work.arranged().checkpoint.rows(name, start, stop)}
        parts = {n: file.rows(n, start, stop) for n in found}
        if name == TABLE and start == 0 and (factors := self.work.table().factors) is not None:
            parts[TABLE_FACTORS] = factors  # whole beside the first rows
        return parts

    def _file(self, name: str) -> SafetensorsFile:
        return SafetensorsFile(self._path(name))

    def _path(self, name: str) -> Path:
        distilled = self.work.recipe.distilled
        if layer := re.match(r"model\.layers\.(\d+)\.", name):
            return self.work.file("distilled" if distilled else "layer", int(layer[1]))
        return self.work.file("final" if distilled and name != TABLE else "table")


def peak_bytes(config: GemmaConfig, recipe: Recipe, bits: float | None = None) -> int:
    """Memory that calibration takes, at most: a layer and what is computed on it."""
    measuring = 0 if bits is None else loss_peak_bytes(config)
    if recipe.rule(TABLE).rounding == "gptq":
        measuring = max(measuring, information_peak_bytes(config))
    width, ffn = config.hidden_size, config.intermediate_size
    inputs = max(width, ffn, config.heads * config.head_dim)
    layer = layer_bytes(config) // 4
    threads = (os.cpu_count() or 1) + 1
    batch = threads * 16 * max(1 << 20, LENGTH * ffn)
    rounding = 4 * (4 * layer + 5 * inputs**2 + threads * 8 * min(SLICE, inputs * width))
    table = threads * 10 * 4 * TABLE_ROWS * width + 5 * config.vocab_size * width // 4 * 2
    learning = 0
    if recipe.distilled:
        residuals = BATCH * LENGTH * width * len(config.kinds)
        learning = 4 * (residuals + 3 * CANDIDATES * width)
        # Gradients of a layer, and a matrix per thread with its averages.
        learning += 4 * (layer * (2 + threads) + threads * 8 * max(width, inputs) * width)
        # Logits of the candidates with their gradients, and the candidates in bfloat16.
        learning += threads * CANDIDATES * (48 * LENGTH + 8 * width)
    return _LIBRARIES + max(table, measuring, batch + max(rounding, learning))
