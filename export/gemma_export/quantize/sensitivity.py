"""`--bits`: which matrices are worth eight bits, found by measuring what four do to their products.

A matrix's loss is the error of its products, relative to their power, over the inputs that the
float model gives it on calibration text. A layer has two branches, and each is normalised before it
is added: so relative errors compare from layer to layer. The table's counts for more: it is looked
up in front of all 2·L branches, and multiplied behind all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_export.checkpoint import Checkpoint, row_blocks
from gemma_export.config import GemmaConfig
from gemma_export.decoder import norm_before
from gemma_export.parallel import in_order
from gemma_export.progress import Tick
from gemma_export.quantize.calibrate import Calibrator
from gemma_export.quantize.calibration import Calibration
from gemma_export.quantize.pack import dequantize
from gemma_export.quantize.recipe import (
    INT8,
    RECIPES,
    TABLE,
    Format,
    Recipe,
    Rule,
    bits_per_weight,
)
from gemma_export.quantize.round import round_rows
from gemma_export.quantize.stream import (
    advance_flow,
    head_inputs,
    load_layer,
    observe_layer,
    start_flow,
)
from gemma_runtime.errors import RecipeError

_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Budget:
    """A recipe, and the most bits per weight that it may take with some of it in int8."""

    base: Recipe
    bits: float

    @property
    def name(self) -> str:
        return f"{self.base.name}-{self.bits:g}bits"


def spend_budget(
    budget: Budget, checkpoint: Checkpoint, calibration: Calibration, tick: Tick
) -> Recipe:
    """The base recipe with int8 where it saves most per bit, within the budget."""
    config = checkpoint.config
    _check_budget(budget, config)
    few = replace(calibration, tokens=calibration.tokens[:_SEQUENCES])
    losses = measure_losses(Calibrator(checkpoint, budget.base, few), tick)
    return choose_int8(budget, config, losses)


def choose_int8(budget: Budget, config: GemmaConfig, losses: Mapping[str, float]) -> Recipe:
    """Most loss per weight first; once with the table and once without, whichever loses less."""
    formats = budget.base.formats(config)
    choices = [
        _fill(budget, config, formats, losses, start)
        for start in ((), (TABLE,))
        if _fits(budget, config, formats, start)
    ]
    best = max(choices, key=lambda chosen: sum(losses[name] for name in chosen))
    return _with_int8(budget, best)


def measure_losses(work: Calibrator, tick: Tick) -> dict[str, float]:
    """Relative error of every matrix's products at four bits; the table's 4·L times."""
    checkpoint, config = work.checkpoint, work.checkpoint.config
    work.folder.mkdir(parents=True, exist_ok=True)
    flow = work.file("probe", 0)
    start_flow(
        flow,
        config,
        work.calibration.tokens,
        lambda token: checkpoint.rows(TABLE, token, token + 1),
    )
    losses: dict[str, float] = {}
    formats = work.formats()
    for layer in config.layers:
        weights = load_layer(checkpoint, layer.index)
        grams = observe_layer(flow, config, layer, weights)
        for name, gram in grams.items():
            error, power = _error_and_power(formats[name], weights[name], gram)
            losses[name] = error / power
        after = work.file("probe", layer.index + 1)
        advance_flow(flow, after, config, layer, weights)
        flow.unlink()
        flow = after
        tick(f"layer {layer.index}", 4 * sum(w.numel() for w in weights.values()))
    gain = checkpoint.rows(norm_before(config, len(config.kinds)), 0, config.hidden_size)
    inputs = torch.cat(list(head_inputs(flow, config, gain)))
    flow.unlink()
    losses[TABLE] = 4 * len(config.kinds) * _table_loss(work, inputs.T @ inputs)
    return losses


def _table_loss(work: Calibrator, gram: Tensor) -> float:
    form = work.formats()[TABLE]

    def measure(span: tuple[int, int]) -> tuple[float, float]:
        return _error_and_power(form, work.checkpoint.rows(TABLE, *span), gram)

    parts = list(in_order(measure, row_blocks(work.checkpoint.config.tensor_shapes()[TABLE])))
    return sum(error for error, _ in parts) / sum(power for _, power in parts)


def _error_and_power(form: Format, rows: Tensor, gram: Tensor) -> tuple[float, float]:
    off = rows - dequantize(round_rows(rows, form, "searched"), form)
    return float(((off @ gram) * off).sum()), float(((rows @ gram) * rows).sum())


def _fill(
    budget: Budget,
    config: GemmaConfig,
    formats: Mapping[str, Format],
    losses: Mapping[str, float],
    start: tuple[str, ...],
) -> tuple[str, ...]:
    shapes = config.tensor_shapes()
    chosen = start
    worth = {name: loss / (shapes[name][0] * shapes[name][1]) for name, loss in losses.items()}
    for name in sorted(worth, key=lambda name: -worth[name]):
        if name != TABLE and _fits(budget, config, formats, (*chosen, name)):
            chosen = (*chosen, name)
    return chosen


def _with_int8(budget: Budget, names: tuple[str, ...]) -> Recipe:
    rules = tuple(Rule(name, INT8, "nearest") for name in sorted(names))
    return replace(budget.base, name=budget.name, rules=(*rules, *budget.base.rules))


def _fits(
    budget: Budget, config: GemmaConfig, formats: Mapping[str, Format], names: tuple[str, ...]
) -> bool:
    return bits_per_weight(config, {**formats, **dict.fromkeys(names, INT8)}) <= budget.bits


def _check_budget(budget: Budget, config: GemmaConfig) -> None:
    formats = budget.base.formats(config)
    least = bits_per_weight(config, formats)
    most = bits_per_weight(config, RECIPES["int8"].formats(config))
    if any(form.bits != 4 for form in formats.values()):
        raise RecipeError(
            f"--bits starts from int4 everywhere, recipe {budget.base.name} is not; choose int4, "
            "int4-gptq or int4-distilled"
        )
    if not least <= budget.bits <= most:
        raise RecipeError(
            f"--bits is {budget.bits:g}; this model takes {least:.3g} in {budget.base.name} to "
            f"{most:.3g} in int8"
        )
