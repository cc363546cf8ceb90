"""`--bits`: which matrices are worth eight bits, by the KL that four of theirs cost.

`curvature` estimates it for each in nats per token, so losses compare from matrix to matrix, and
with the table's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_export.checkpoint import Checkpoint
from gemma_export.config import GemmaConfig
from gemma_export.progress import Stage
from gemma_export.quantize.calibration import Calibration
from gemma_export.quantize.calibrator import Calibrator
from gemma_export.quantize.curvature import loss_bytes, measure_losses
from gemma_export.quantize.recipe import (
    INT8,
    INT8_WIDE,
    RECIPES,
    TABLE,
    Format,
    Recipe,
    Rule,
    bits_per_weight,
)
from gemma_runtime.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Budget:
    """A recipe, and the most bits per weight that it may take with some of it in int8."""

    base: Recipe
    bits: float

    @property
    def name(self) -> str:
        return f"{self.base.name}-{self.bits:g}bits"


def spend_budget(
    budget: Budget, checkpoint: Checkpoint, calibration: Calibration, stage: Stage
) -> Recipe:
    """The base recipe with int8 where it saves most per bit, within the budget."""
    config = checkpoint.config
    _check_budget(budget, config)
    work = Calibrator(checkpoint, budget.base, calibration)
    with stage("measure", loss_bytes(work)) as tick:
        losses = measure_losses(work, tick)
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
    return _with_int8(budget, config, best)


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


def _with_int8(budget: Budget, config: GemmaConfig, names: tuple[str, ...]) -> Recipe:
    rules = tuple(Rule(name, _eight_bits(config, name), "nearest") for name in sorted(names))
    return replace(budget.base, name=budget.name, rules=(*rules, *budget.base.rules))


def _eight_bits(config: GemmaConfig, name: str) -> Format:
    """Groups of 128 where they fit: beside int4 their steps are fine, and fewer scales are kept."""
    return INT8 if config.tensor_shapes()[name][1] % INT8_WIDE.group else INT8_WIDE


def _fits(
    budget: Budget, config: GemmaConfig, formats: Mapping[str, Format], names: tuple[str, ...]
) -> bool:
    raised = {name: _eight_bits(config, name) for name in names}
    return bits_per_weight(config, {**formats, **raised}) <= budget.bits


def _check_budget(budget: Budget, config: GemmaConfig) -> None:
    formats = budget.base.formats(config)
    least = bits_per_weight(config, formats)
    most = bits_per_weight(config, RECIPES["int8"].formats(config))
    if any(form.bits != 4 for form in formats.values()):
        raise RecipeError(
            f"--bits starts from int4 everywhere, recipe {budget.base.name} is not; choose int4 or "
            "int4-asym, alone or with -gptq or -distilled"
        )
    if not least <= budget.bits <= most:
        raise RecipeError(
            f"--bits is {budget.bits:g}; this model takes {least:.3g} in {budget.base.name} to "
            f"{most:.3g} in int8"
        )
