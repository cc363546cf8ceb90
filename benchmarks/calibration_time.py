"""Compares what `--plan` says of calibration's time with measured runs, stage by stage.

    python benchmarks/calibration_time.py                      # minutes
    python benchmarks/calibration_time.py --sizes 270m 2b --layers 2 --sequences 32

Each model has the shapes of a size, but only so many layers and tokens, random weights in memory,
and random text. CPU seconds are those of all threads divided by the cores in use: on a busy machine
they are nearer to the time of an idle one than the clock is.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter, process_time

import torch
from torch import Tensor

from gemma_export.checkpoint.random import RandomCheckpoint
from gemma_export.computing import CPU
from gemma_export.device import grain
from gemma_export.model.config import GemmaConfig
from gemma_export.model.sizes import find_official
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate.budget import Budget, spend_budget
from gemma_export.quantize.calibrate.text import LENGTH, Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.effort import calibration_efforts, measure_rates
from gemma_export.quantize.recipe import RECIPES, bits_per_weight

_RECIPES = ("int8-smooth", "int4-distilled")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["270m", "1b"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", default=_RECIPES)
    options = parser.parse_args()
    print("| model | recipe | stage | estimate, s | measured, s | CPU, s | CPU / estimate |")
    print("|---|---|---|---|---|---|---|")
    for size in options.sizes:
        config = _cut(find_official(size).config, options.layers, options.vocabulary)
        for recipe in options.recipes:
            for row in _measure(config, recipe, options.sequences):
                print(f"| {size} | {recipe} | {' | '.join(row)} |", flush=True)


def _cut(config: GemmaConfig, layers: int, vocabulary: int) -> GemmaConfig:
    return replace(config, kinds=config.kinds[:layers], vocab_size=vocabulary)


@dataclass(frozen=True)
class _InMemory(RandomCheckpoint):
    """Random weights that are drawn once, since drawing them takes longer than reading a file."""

    drawn: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.drawn:
            whole = self.config.tensor_shapes()[name][0]
            self.drawn[name] = RandomCheckpoint.rows(self, name, 0, whole)
        return self.drawn[name][start:stop]


def _measure(config: GemmaConfig, name: str, sequences: int) -> Iterator[tuple[str, ...]]:
    checkpoint = _InMemory(config)
    for tensor in config.tensor_shapes():
        checkpoint.rows(tensor, 0, 1)
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (sequences, LENGTH), generator=drawn)
    text, recipe = Calibration("random", tokens), RECIPES[name]
    bits = None if recipe.is_smooth else bits_per_weight(config, recipe.formats(config)) + 1
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEMMA_EXPORT_CACHE"] = folder
        rates = measure_rates(CPU)
        efforts = calibration_efforts(config, recipe, sequences, spends_bits=bits is not None)
        if bits is not None:
            spend_budget(Budget(recipe, bits), checkpoint, text, clock.stage, splits_table=True)
        CalibratedWeights(Workspace(checkpoint, recipe, text, CPU), clock.stage).round_all()
    for stage, effort in efforts.items():
        wall, cpu = clock.seconds[stage]
        own, cpu = rates.seconds(effort), cpu / grain(CPU.type).workers
        yield stage, f"{own:.1f}", f"{wall:.1f}", f"{cpu:.1f}", f"{cpu / own:.2f}"


class _Clock:
    """Measures stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Tick]:
        wall, cpu = perf_counter(), process_time()
        yield lambda name, done: None
        self.seconds[title] = perf_counter() - wall, process_time() - cpu


if __name__ == "__main__":
    main()
