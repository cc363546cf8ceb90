"""Random weights of any size, generated when they are read, and the same for every read.

Rows are drawn in strips, each from its own seed, so even a 27b takes little memory.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.checkpoint.generation import GenerationDefaults
from gemma_export.model.config import GemmaConfig, is_gain

_STRIP = 64  # rows that share a seed
_NORM_SPREAD = 0.2  # norm gains are 1 ± this
_LAYER_SCALE = 0.6  # average number that scales a layer's output


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """Normally distributed weights with variance 1 / inputs, which keeps activations' size."""

    config: GemmaConfig
    seed: int = 0

    @property
    def id(self) -> str:
        return f"random:{self.seed}"

    @property
    def revision(self) -> None:
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        return ("the weights are random, so the model's text is meaningless",)

    @property
    def generation(self) -> GenerationDefaults:
        return GenerationDefaults()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        shape = self.config.tensor_shapes()[name]
        if len(shape) == 1:
            values = 1 + self._strip(name, 0, shape) * _NORM_SPREAD
            return self._vector(name, values)[start:stop]
        first, last = start // _STRIP, (stop - 1) // _STRIP
        strips = [
            self._strip(name, i, (min(_STRIP, shape[0] - i * _STRIP), shape[1]))
            for i in range(first, last + 1)
        ]
        values = torch.cat(strips)[start - first * _STRIP : stop - first * _STRIP]
        # A copy, so that a row doesn't keep its whole strip.
        return torch.mul(values, shape[1] ** -0.5)

    def _vector(self, name: str, values: Tensor) -> Tensor:
        """A gain - 1, or the number that scales a layer's output."""
        if not is_gain(name):
            return values * _LAYER_SCALE
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # Scores of the size that scaled queries have; larger ones make the model chaotic.
            values = values * (self.config.query_scale * len(values) ** 0.5) ** -0.5
        return values - 1

    def digest(self) -> str:
        return hashlib.sha256(f"{self.id} {self.config}".encode()).hexdigest()

    def tokenizer(self) -> TokenizerFiles | None:
        return None

    def _strip(self, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
        key = hashlib.sha256(f"{self.seed} {name} {index}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(key[:8], "little")))
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
