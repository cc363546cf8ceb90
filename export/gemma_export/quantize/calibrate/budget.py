"""`--bits`: chooses the matrices that get int8, by the KL that int4 costs them.

`curvature` estimates the KL in nats per token, so losses of matrices and of the table are
comparable. The table may also have int8 in some columns only. Together, the int4 matrices lose more
than the sum of their estimates: the choice favours underestimated losses, and each was estimated
with all other weights in float.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from gemma_export.checkpoint import Checkpoint
from gemma_export.computing import CPU, computing
from gemma_export.formats.format import INT8
from gemma_export.model.config import HEAD, PER_LAYER_MATRICES, TABLE, GemmaConfig
from gemma_export.progress import Note, Stage, silent
from gemma_export.quantize.calibrate.curvature import Losses, loss_bytes, measure_losses
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import RECIPES, Recipe, Rounding, Rule, bits_per_weight
from gemma_runtime.errors import RecipeError

# Ratio of the layers' loss to its estimate. With float activations, a 270M at 7.5 bits lost 0.0201.
# The estimates are 0.0072 for the table and 0.0075 for 44 matrices, so the matrices lost 1.7 times
# their estimate. With more of the table and no layers in int4, it lost 0.0159, as estimated.
_TOGETHER = 1.5


@dataclass(frozen=True, slots=True)
class Budget:
    """An int4 recipe, and the most bits per weight that it may have with int8 added."""

    base: Recipe
    bits: float

    @property
    def name(self) -> str:
        return f"{self.base.name}-{self.bits:g}bits"


def spend_budget(
    budget: Budget,
    checkpoint: Checkpoint,
    calibration: Calibration,
    stage: Stage,
    *,
    splits_table: bool,
    device: torch.device = CPU,
    note: Note = silent,
) -> Recipe:
    """The base recipe with int8 where it reduces the loss most per weight, within the budget.

    The table may get int4 and int8 columns if `splits_table`.
    """
    config = checkpoint.config
    _check_budget(budget, config)
    work = Workspace(checkpoint, budget.base, calibration, device)
    bar = stage("measure", loss_bytes(work))
    with work.locked(note), computing(work.device), bar as tick:
        losses = measure_losses(work, tick)
    if not splits_table:
        losses = replace(losses, table={0: losses.table[0]})
    return choose_int8(budget, config, losses)


def choose_int8(budget: Budget, config: GemmaConfig, losses: Losses) -> Recipe:
    """Try each format of the table, fill layers by loss per weight; the least total loss wins."""
    below = budget.base.rule(TABLE)
    tables = {
        replace(below, pattern=TABLE, format=replace(below.format, int8_columns=columns)): loss
        for columns, loss in losses.table.items()
    }
    tables[_raised(budget.base, TABLE)] = 0.0
    choices: list[tuple[float, tuple[Rule, ...]]] = []
    for table, loss in tables.items():
        if _fits(budget, config, (table,)):
            rules, left = _fill(budget, config, losses.matrices, table)
            choices.append((loss + _TOGETHER * left, rules))
    _, rules = min(choices, key=lambda choice: choice[0])
    own = tuple(sorted((r for r in rules if r != below), key=lambda rule: rule.pattern))
    if not config.tied and all(rule.pattern != HEAD for rule in own):
        own = (*own, replace(budget.base.rule(HEAD), pattern=HEAD))  # else it follows the table
    return replace(budget.base, name=budget.name, rules=(*own, *budget.base.rules))


def _fill(
    budget: Budget, config: GemmaConfig, losses: Mapping[str, float], table: Rule
) -> tuple[tuple[Rule, ...], float]:
    """Rules for the table and the layers' int8 matrices, and the loss of the other matrices."""
    shapes = config.tensor_shapes()
    density = {name: loss / (shapes[name][0] * shapes[name][1]) for name, loss in losses.items()}
    rules: tuple[Rule, ...] = (table,)
    left = 0.0
    for name in sorted(density, key=lambda name: -density[name]):
        more = (*rules, _raised(budget.base, name))
        if _fits(budget, config, more):
            rules = more
        else:
            left += losses[name]
    return rules, left


def _raised(base: Recipe, name: str) -> Rule:
    """Int8 for a matrix, rounded by gptq if the base recipe does so, else to nearest."""
    rule = base.rule(name)
    rounding: Rounding = "gptq" if rule.rounding == "gptq" else "nearest"
    return Rule(name, INT8, rounding, rule.smooth)


def _fits(budget: Budget, config: GemmaConfig, rules: tuple[Rule, ...]) -> bool:
    raised = {rule.pattern: rule.format for rule in rules}
    return bits_per_weight(config, {**budget.base.formats(config), **raised}) <= budget.bits


def _check_budget(budget: Budget, config: GemmaConfig) -> None:
    formats = budget.base.formats(config)
    least = bits_per_weight(config, formats)
    most = bits_per_weight(config, RECIPES["int8"].formats(config))
    gates = {name for name in formats if fnmatchcase(name, PER_LAYER_MATRICES)}  # always more
    if any(fmt.bits != 4 for name, fmt in formats.items() if name not in gates):
        raise RecipeError(
            f"--bits needs a recipe with int4 everywhere, not {budget.base.name}; choose int4 or "
            "int4-asym, alone or with -gptq or -distilled"
        )
    if not least <= budget.bits <= most:
        raise RecipeError(
            f"--bits is {budget.bits:g}; expected {least:.3g} ({budget.base.name}) to {most:.3g} "
            "(int8) for this model"
        )
