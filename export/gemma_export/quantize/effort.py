"""How much work calibration is, counted from shapes, and how long that takes at measured rates.

Each stage is counted as multiply-adds of matrix products, and as bytes that element-wise steps and
files move. Both are divided by rates that `measure_rates` finds on the machine as it is now.
docs/measurements.md, "Time of calibration", compares estimates with measured runs.

M width, K inputs, N outputs, V vocabulary, G groups of a row.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from math import prod
from time import perf_counter

import torch

from gemma_export.computing import CPU, product_dtype
from gemma_export.device import HOST, grain
from gemma_export.model.config import PER_LAYER_TABLE, TABLE, GemmaConfig
from gemma_export.parallel import in_order, workers
from gemma_export.quantize.calibrate import (
    arrange,
    cache_scales,
    curvature,
    fisher,
    gptq,
    layers,
    smooth,
)
from gemma_export.quantize.calibrate.text import LENGTH
from gemma_export.quantize.calibrated import rounds_layers_by_text, weighs_table
from gemma_export.quantize.distill import distill
from gemma_export.quantize.distill.candidates import CANDIDATES
from gemma_export.quantize.recipe import Recipe
from gemma_export.quantize.round import NEARBY
from gemma_export.shards import Share

_OVERHEAD = 1.5  # of memory that is taken anew, and of clocks that fall after the probes' bursts
_FLOAT = 4  # bytes
_BACKWARD = 2  # a layer is run again, and its inputs' gradients cost as much
_LEARNING = 3  # the same, and its weights' gradients
_FACTORIZING = 4 / 3  # of K³: two Cholesky factors and an inverse between them
_SOLVING = 80  # a multiply-add of a small linear system takes as long as so many of a product
_SEARCHED = 24  # times that a weight is read or written for each candidate scale
_SWAPPED = 80  # the same for each candidate of `smooth` and each of its steps, with gradients
_STEPPED = 24  # the same in a step of distillation: dequantized twice, gradients, Adam's averages
_SWAP = 26  # operations per swap of two channels
_PROBED = 1024  # rows and columns of the products that are timed
_STREAMED = 1 << 22  # elements that are read and written
_SMALL = 1 << 13  # elements of a small operation
_PROBE_SECONDS = 0.05
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Effort:
    """What a stage of calibration computes."""

    short: float = 0  # multiply-adds of products in the dtype of `product_dtype`
    exact: float = 0  # multiply-adds of products in float32
    solved: float = 0  # those of linear systems, in as many of products as take as long
    moved: float = 0  # bytes of element-wise steps and of files
    serial: float = 0  # small operations, one after another

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: float) -> "Effort":
        return Effort(*(count * own for own in astuple(self)))


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does per second."""

    short: float  # multiply-adds
    exact: float
    solved: float
    moved: float  # bytes
    serial: float  # small operations

    def seconds(self, effort: Effort) -> float:
        amounts: tuple[float, ...] = astuple(effort)
        rates: tuple[float, ...] = astuple(self)
        return _OVERHEAD * sum(a / rate for a, rate in zip(amounts, rates, strict=True))


def calibration_efforts(
    config: GemmaConfig,
    recipe: Recipe,
    sequences: int,
    *,
    spends_bits: bool = False,
    int8_caches: bool = False,
) -> dict[str, Effort]:
    """The effort of each stage that the recipe has, by the name that progress shows.

    `sequences` is the length of the calibration text. `spends_bits` counts `--bits`.
    """
    count = _Counter(config, recipe, sequences)
    efforts: dict[str, Effort] = {}
    if spends_bits:
        efforts["measure"] = count.measuring()
    if recipe.observes_inputs:
        efforts["smooth"] = count.smoothing()
    if weighs_table(recipe, config):
        efforts["channels"] = count.ordering()
    if recipe.distilled:
        efforts["teacher"] = count.passing(sequences)
    if recipe.rounds_by_text:
        efforts["table"] = count.rounding_tables()
    if rounds_layers_by_text(recipe, count.formats):
        efforts["calibrate"] = count.rounding_layers()
    if recipe.distilled:
        efforts["distill"] = count.distilling()
    if int8_caches:
        efforts["caches"] = count.passing(cache_scales.SEQUENCES)
    return efforts


class _Counter:
    """Counts for one model, recipe and length of the text."""

    def __init__(self, config: GemmaConfig, recipe: Recipe, sequences: int) -> None:
        self.formats = recipe.formats(config)
        self._config, self._recipe, self._sequences = config, recipe, sequences
        self._width, self._shapes = config.hidden_size, config.tensor_shapes()
        self._layers: dict[str, list[str]] = {}  # names of each layer's matrices
        for name in self.formats:
            if name.startswith("model.layers."):
                self._layers.setdefault(name.split(".")[2], []).append(name)
        self._inner = [name for names in self._layers.values() for name in names]
        self._weights = sum(prod(self._shapes[name]) for name in self._inner)

    def passing(self, most: int) -> Effort:
        """Running at most so many sequences through all layers, once."""
        tokens, config = self._tokens(most), self._config
        # Attention in float32: scores and their sum of values, of all positions.
        attended = sum(2 * x.heads * x.head_dim * LENGTH for x in config.layers)
        activations = 8 * (self._width + 2 * config.widest_ffn) * len(config.kinds)
        return Effort(
            short=self._weights * tokens,
            exact=attended * tokens,
            moved=_FLOAT * (activations * tokens + self._weights),
        )

    def observing(self, most: int) -> Effort:
        """The same, with the Gram matrices of all inputs; half of each is computed."""
        widths = ({self._shapes[name][1] for name in names} for names in self._layers.values())
        squares = sum(width**2 for layer in widths for width in layer)
        return self.passing(most) + Effort(exact=squares / 2 * self._tokens(most))

    def smoothing(self) -> Effort:
        # Inputs of attention, of the feed-forward part and of its end, and of the head.
        inputs = self._width + sum(2 * self._width + x.ffn for x in self._config.layers)
        seen = (smooth.POSITIONS + smooth.ROWS) * smooth.STEPS * inputs
        return self.passing(smooth.SEQUENCES) + Effort(
            exact=self._tokens(smooth.SEQUENCES) * self._width**2,
            moved=_SWAPPED * _FLOAT * seen if self._recipe.is_smooth else 0,
        )

    def ordering(self) -> Effort:
        return self._informing() + self._arranging()

    def measuring(self) -> Effort:
        """Gram matrices of inputs and of gradients, and rounding everything once, or a sample."""
        tokens = self._tokens(fisher.SEQUENCES)
        total = self._informing() + self.observing(fisher.SEQUENCES)
        for name in self._inner:
            rows, width = self._shapes[name]
            block = min(rows, curvature.WIDEST)
            judging = rows * width**2 + rows * block * width
            total += Effort(exact=rows * block * tokens + judging)
            total += self._rounding(name, refined=0)
        for name in self._config.tables:
            rows = self._config.vocab_size
            table = self._rounding(name, refined=0) + Effort(exact=rows * self._width**2)
            if self._recipe.rule(name).rounding == "gptq":
                table = table.times(1 / curvature.SPARSE) + self._arranging()
            tried = curvature.tried_columns(self._config, self._recipe) if name == TABLE else [0]
            total += table.times(len(tried))
        if self._config.per_layer:
            total += self._rounding(PER_LAYER_TABLE).times(1 / curvature.SPARSE)
        return total

    def rounding_tables(self) -> Effort:
        names = layers.outer_matrices(self._config, self._recipe)
        return sum((self._rounding(name) for name in names), Effort())

    def rounding_layers(self) -> Effort:
        """Sequences pass each layer twice: before it is rounded, and after."""
        passes = self.observing(layers.SEQUENCES) + self.passing(layers.SEQUENCES)
        return sum((self._rounding(name) for name in self._inner), passes)

    def distilling(self) -> Effort:
        """Steps of some sequences, forward and backward through layers and candidates."""
        steps, pieces = distill.count_steps(self._sequences), Share(self._sequences).count_pieces
        tokens, chosen = steps * pieces * LENGTH, min(CANDIDATES, self._config.vocab_size)
        each = self.passing(pieces).times((1 + _LEARNING) * steps)
        return each + Effort(
            short=3 * tokens * chosen * self._width,  # both models' logits, and the gradient
            moved=_FLOAT * (8 * tokens * chosen + _STEPPED * steps * self._weights),
        )

    def _informing(self) -> Effort:
        """The forward and the backward pass; labels read the head thrice."""
        tokens = self._tokens(fisher.SEQUENCES)
        logits = self._config.vocab_size * tokens
        return self.passing(fisher.SEQUENCES).times(1 + _BACKWARD) + Effort(
            short=3 * logits * self._width,
            exact=2 * tokens * self._width**2,
            moved=8 * _FLOAT * logits,
        )

    def _arranging(self) -> Effort:
        """The search for an order of the channels."""
        return Effort(serial=arrange.SWAPS * self._width * _SWAP * len(self._config.tables))

    def _tokens(self, most: int) -> int:
        """Tokens of at most so many sequences."""
        return min(self._sequences, most) * LENGTH

    def _rounding(self, name: str, refined: int = gptq.REFINED) -> Effort:
        """Rounding a matrix by the recipe's rule."""
        rows, width = self._shapes[name]
        fmt, weights = self.formats[name], rows * width
        if fmt.is_float:
            return Effort(moved=_FLOAT * weights)
        rounding = self._recipe.rule(name).rounding
        ranges = NEARBY if rounding == "weighted" else gptq.SHRINKS
        searched = Effort(moved=_FLOAT * _SEARCHED * len(ranges) * weights)
        if rounding != "gptq":
            return searched
        refined = refined if width <= gptq.WIDE else 0
        groups = width // fmt.group
        # Column by column within a block, half of it on average; caches are twice as fast.
        columns = Effort(exact=weights * width / 2, moved=_FLOAT * gptq.BLOCK / 2 * weights)
        # `_descend` has another product with the Gram matrix, `_refit` two and linear systems, each
        # of whose rows is summed up from all groups.
        refining = Effort(
            exact=3 * weights * width,
            solved=_SOLVING * rows * groups**3 / 3,
            moved=3 * _FLOAT * groups * weights,
        )
        factors = Effort(solved=_FACTORIZING * width**3 * (2 if width <= gptq.WIDE else 1))
        return searched + columns + (columns + refining).times(refined) + factors


@cache
def measure_rates(device: torch.device) -> Rates:
    """What a device does per second now, as calibration uses it: each worker by itself."""
    short = _product_rate(device, product_dtype(device))
    exact = _product_rate(device, torch.float32)
    x = torch.zeros(_STREAMED, device=device)
    moved = _rate(device, lambda: x + x, 2 * _FLOAT * _STREAMED)
    small = torch.zeros(_SMALL, device=HOST)
    serial = _rate(CPU, lambda: small.add_(1), 1, count=1)
    return Rates(short, exact, exact, moved, serial)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    x = torch.zeros(_PROBED, _PROBED, dtype=dtype, device=device)
    return _rate(device, lambda: x @ x, _PROBED**3)


def _rate(
    device: torch.device, work: Callable[[], object], amount: int, count: int | None = None
) -> float:
    """Amount per second of all workers together, or of so many, each repeating this work."""
    count = count or grain(device.type).workers

    def repeat(times: int) -> float:
        started = perf_counter()
        with workers(count):
            for _ in in_order(lambda _: [work() for _ in range(times)], range(count)):
                pass
        if device.type != HOST:
            torch.get_device_module(device).synchronize()
        return perf_counter() - started

    repeat(1)  # threads and caches
    times = 1
    while (seconds := repeat(times)) < _PROBE_SECONDS:
        times *= 2
    best = min(seconds, *(repeat(times) for _ in range(_REPEATS - 1)))
    return amount * times * count / best
