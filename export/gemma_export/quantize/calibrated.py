"""What calibration and distillation leave, as the store wants it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gemma_export.checkpoint import BLOCK_ELEMENTS
from gemma_export.checkpoint.safetensors import SafetensorsFile
from gemma_export.config import GemmaConfig
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate import Calibrator, calibrate
from gemma_export.quantize.calibration import LENGTH
from gemma_export.quantize.candidates import CANDIDATES
from gemma_export.quantize.distill import BATCH, count_steps, distill
from gemma_export.quantize.pack import Codes
from gemma_export.quantize.recipe import TABLE, Recipe

_LIBRARIES = 400 << 20  # torch, and the tokenizer's leavings
_DISTILLED = "distilled-1"  # raise it when what is learned changes


@dataclass(frozen=True, slots=True)
class CalibratedWeights:
    work: Calibrator
    tick: Tick

    @property
    def key(self) -> str:
        return f"{self.work.key} {_DISTILLED}" if self.work.recipe.distilled else self.work.key

    def round_all(self) -> None:
        calibrate(self.work, self.tick)
        if self.work.recipe.distilled:
            distill(self.work, self.tick)

    def parts(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        file = self._file(name)
        found = [n for n in (name, *(f"{name}.{p}" for p in Codes._fields)) if n in file.tensors]
        if not found:  # a gain that nothing learned
            return {name: self.work.checkpoint.rows(name, start, stop)}
        return {n: file.rows(n, start, stop) for n in found}

    def _file(self, name: str) -> SafetensorsFile:
        return SafetensorsFile(self._path(name))

    def _path(self, name: str) -> Path:
        distilled = self.work.recipe.distilled
        if layer := re.match(r"model\.layers\.(\d+)\.", name):
            return self.work.file("distilled" if distilled else "layer", int(layer[1]))
        return self.work.file("final" if distilled and name != TABLE else "table")


def peak_bytes(config: GemmaConfig, recipe: Recipe) -> int:
    """Memory that calibration takes, at most: a layer and what is computed on it."""
    width, ffn = config.hidden_size, config.intermediate_size
    inputs = max(width, ffn, config.heads * config.head_dim)
    layer = (config.parameters - config.vocab_size * width) // len(config.kinds)
    threads = (os.cpu_count() or 1) + 1
    batch = threads * 16 * max(1 << 20, LENGTH * ffn)
    rounding = 4 * (3 * layer + 5 * inputs**2)
    table = threads * 10 * 4 * BLOCK_ELEMENTS + 5 * config.vocab_size * width // 4 * 2
    learning = 0
    if recipe.distilled:
        scales = (config.parameters - config.vocab_size * width) // 32
        residuals = BATCH * LENGTH * width * len(config.kinds)
        learning = 4 * (4 * scales + residuals + 3 * CANDIDATES * width)
        learning += 4 * layer * (2 + threads)
        # Logits of the candidates with their gradients, and the candidates in bfloat16.
        learning += threads * CANDIDATES * (48 * LENGTH + 8 * width)
    return _LIBRARIES + max(table, batch + max(rounding, learning))


def work_bytes(work: Calibrator) -> int:
    """Float32 bytes of the weights that calibration passes by, for progress."""
    config = work.checkpoint.config
    layers = 4 * (config.parameters - config.vocab_size * config.hidden_size)
    total = 2 * layers
    if work.recipe.distilled or work.recipe.rule(TABLE).rounding == "gptq":
        total += layers  # the float model
    return total + (count_steps(work) * 4 * config.parameters if work.recipe.distilled else 0)
