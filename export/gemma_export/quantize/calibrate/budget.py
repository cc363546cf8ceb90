"""`--bits`: which matrices are worth eight bits, by the KL that four of theirs cost.

`curvature` estimates it for each in nats per token, so losses compare from matrix to matrix, and
with the table's, of whose channels some may be worth eight bits and others not. Those of the
layers that stay in four bits add up to more than their sum: they are the ones that seemed least,
and each was judged beside float ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_export.checkpoint import Checkpoint
from gemma_export.formats.format import INT8
from gemma_export.model.config import TABLE, GemmaConfig
from gemma_export.progress import Note, Stage, silent
from gemma_export.quantize.calibrate.curvature import Losses, loss_bytes, measure_losses
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import RECIPES, Recipe, Rule, bits_per_weight
from gemma_runtime.errors import RecipeError

# What stays in four bits costs more than its estimate, and a choice that leaves less is better for
# it. With float activations, a 270M at 7.5 bits lost 0.0201: the table's estimate is 0.0072 of it,
# that of 44 matrices 0.0075, so these lost 1.7 times as much. With more of the table in four bits
# and none of the layers, it lost the 0.0159 that were foretold.
_TOGETHER = 1.5


@dataclass(frozen=True, slots=True)
class Budget:
    """A recipe, and the most bits per weight that it may take with some of it in int8."""

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
    note: Note = silent,
) -> Recipe:
    """The base recipe with int8 where it saves most per bit, within the budget.

    Channels of the table may be divided between int4 and int8 where that is allowed.
    """
    config = checkpoint.config
    _check_budget(budget, config)
    work = Workspace(checkpoint, budget.base, calibration)
    with work.locked(note), stage("measure", loss_bytes(work)) as tick:
        losses = measure_losses(work, tick)
    if not splits_table:
        losses = replace(losses, table={0: losses.table[0]})
    return choose_int8(budget, config, losses)


def choose_int8(budget: Budget, config: GemmaConfig, losses: Losses) -> Recipe:
    """Most loss per weight first, beside every choice for the table: whichever loses least."""
    below = budget.base.rule(TABLE)
    tables = {
        Rule(TABLE, replace(below.format, int8_columns=columns), below.rounding): loss
        for columns, loss in losses.table.items()
    }
    tables[_raised(budget.base, TABLE)] = 0.0
    choices: list[tuple[float, tuple[Rule, ...]]] = []
    for table, loss in tables.items():
        if _fits(budget, config, (table,)):
            rules, left = _fill(budget, config, losses.matrices, table)
            choices.append((loss + _TOGETHER * left, rules))
    _, rules = min(choices, key=lambda choice: choice[0])
    kept = tuple(sorted((r for r in rules if r != below), key=lambda rule: rule.pattern))
    return replace(budget.base, name=budget.name, rules=(*kept, *budget.base.rules))


def _fill(
    budget: Budget, config: GemmaConfig, losses: Mapping[str, float], table: Rule
) -> tuple[tuple[Rule, ...], float]:
    """Rules for the table and for what of the layers fits into int8, and what the others lose."""
    shapes = config.tensor_shapes()
    worth = {name: loss / (shapes[name][0] * shapes[name][1]) for name, loss in losses.items()}
    rules: tuple[Rule, ...] = (table,)
    left = 0.0
    for name in sorted(worth, key=lambda name: -worth[name]):
        more = (*rules, _raised(budget.base, name))
        if _fits(budget, config, more):
            rules = more
        else:
            left += losses[name]
    return rules, left


def _raised(base: Recipe, name: str) -> Rule:
    """Int8 for a matrix: rounded by gptq where the base recipe does that, else to the nearest."""
    rounding = base.rule(name).rounding
    return Rule(name, INT8, rounding if rounding == "gptq" else "nearest")


def _fits(budget: Budget, config: GemmaConfig, rules: tuple[Rule, ...]) -> bool:
    raised = {rule.pattern: rule.format for rule in rules}
    return bits_per_weight(config, {**budget.base.formats(config), **raised}) <= budget.bits


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
