"""`--quant auto`: chooses the recipe of an export that names none.

The order of the candidates follows docs/measurements.md: what they lose on a 270M, by recipe and by
language. The first one that all targets can hold is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from gemma_export.model.config import GemmaConfig
from gemma_export.quantize.recipe import RECIPES, Recipe, bits_per_weight
from gemma_export.targets import Geometry, Target, target_spec
from gemma_runtime.errors import RecipeError, TargetError

_SMALL = 600_000_000  # parameters: up to here 4 bits lose too much
_LEAST_KEPT = 0.5  # share of the weights whose codes `source` has to keep
_GPTQ_BITS = 7.5  # from here on GPTQ loses as little as distillation, in a fraction of the time


@dataclass(frozen=True, slots=True)
class Choice:
    recipe: Recipe
    reason: str | None = None  # why, as a clause for the user; None if the user chose

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell the user."""
        return () if self.reason is None else (f"recipe {self.recipe.name}: {self.reason}",)


def exact_choice() -> Choice:
    """The recipe of --require-exact."""
    return Choice(RECIPES["source"], "--require-exact asks for the checkpoint's own codes")


@dataclass(frozen=True, slots=True)
class Needs:
    """What a recipe has to suit."""

    config: GemmaConfig
    targets: Sequence[Target]
    geometry: Geometry
    bits: float | None  # of --bits
    has_text: Callable[[], bool]  # whether calibration text can be encoded
    source: Recipe | None  # what `source` keeps of a quantized checkpoint; None if it is not one


@dataclass(frozen=True, slots=True)
class _Candidate:
    recipe: str
    reason: str
    best_for: Callable[[Target], bool] = lambda target: True


def _gains_by_smoothing(target: Target) -> bool:
    """Whether it rounds what factors even out. Where inputs stay float, factors only cost."""
    return target_spec(target.name).rounds_inputs


def _is_fast_with_zero_points(target: Target) -> bool:
    return target_spec(target.name).fast_zero_points


_TOO_MUCH = "in 4 bits a small model loses too much"
_WEIGHTED = "in 8 bits that fit the head's largest inputs a small model loses least"
_WIDE_TABLE = "4 bits, and 8 for the table, whose rows break in 4 in some languages"
_IN_8_BITS = (
    _Candidate(
        "int8-smooth",
        "in 8 bits with smoothed inputs a small model loses least",
        _gains_by_smoothing,
    ),
    _Candidate(
        "int8-channel-smooth",
        "in 8 bits with smoothed inputs a small model loses least",
        _gains_by_smoothing,
    ),
    _Candidate("int8-weighted", _WEIGHTED),
    _Candidate("int8-channel-weighted", _WEIGHTED),
    _Candidate("int8", _TOO_MUCH),
    _Candidate("int8-channel", _TOO_MUCH),
    _Candidate("int4-gptq", "there are kernels for 4 bits only, and calibration saves most"),
    _Candidate("int4", "there are kernels for 4 bits only"),
)
_IN_4_BITS = (
    _Candidate(
        "mixed",
        "4 bits with zero points, and 8 for the table, whose rows break in 4 in some languages",
        _is_fast_with_zero_points,
    ),
    _Candidate("int4-table8", _WIDE_TABLE),
    _Candidate("int4-table8-channel", _WIDE_TABLE),
    _Candidate("int4", "there are kernels for 4 bits only; int4-gptq loses less, and takes hours"),
    _Candidate("int8-channel", "the target takes one scale per channel"),
)
_FLOAT = _Candidate("none", "there are no kernels for quantized weights")


def choose_recipe(needs: Needs) -> Choice:
    """The first recipe that suits. Raises TargetError if the targets have none in common."""
    if needs.bits is not None:
        return _first(needs, _with_bits(needs.config, needs.bits))
    is_small = needs.config.parameters <= _SMALL
    alone = (_FLOAT,) if len(needs.targets) == 1 else ()
    candidates = (*(_IN_8_BITS if is_small else _IN_4_BITS), *alone)
    source = needs.source
    if source is None or not _suits(needs, source) or not _keeps_most(needs.config, source):
        return _first(needs, candidates)
    bits = bits_per_weight(needs.config, source.formats(needs.config))
    if is_small and bits >= _GPTQ_BITS:
        # Its own 8 bits are no better than ours where we smooth all that the runtime rounds.
        ours = _first(needs, candidates)
        if ours.recipe.is_smooth and all(target_spec(t.name).scales_table for t in needs.targets):
            return ours
    return Choice(source, "the checkpoint is quantized, and rounding again would lose more")


def fitted(recipe: Recipe, config: GemmaConfig, targets: Sequence[Target]) -> Recipe:
    """The recipe with the int8 that the targets have, where it asks for no particular one."""
    if config.per_layer and not any(target_spec(target.name).int8_groups for target in targets):
        return recipe.with_per_layer_channels()
    return recipe


def _with_bits(config: GemmaConfig, most: float) -> tuple[_Candidate, ...]:
    """Candidates that leave bits to spend; `int4` also if it leaves none, and is then refused."""
    reason = "--bits adds int8 to it, and it loses less than other 4 bits"
    names = ["int4-asym-gptq", "int4-gptq", "int4-asym"]
    if most < _GPTQ_BITS:
        names = ["int4-asym-distilled", "int4-distilled", *names]
    fitting = [n for n in names if bits_per_weight(config, RECIPES[n].formats(config)) <= most]
    return tuple(_Candidate(name, reason) for name in (*fitting, "int4"))


def _first(needs: Needs, candidates: Sequence[_Candidate]) -> Choice:
    for candidate in candidates:
        recipe = fitted(RECIPES[candidate.recipe], needs.config, needs.targets)
        if all(map(candidate.best_for, needs.targets)) and _suits(needs, recipe):
            return Choice(recipe, candidate.reason)
    names = ", ".join(target.name for target in needs.targets)
    raise TargetError(
        f"no recipe suits all of {names} for this model; export for one target at a time, or "
        "choose one with --quant"
    )


def _suits(needs: Needs, recipe: Recipe) -> bool:
    try:
        formats = recipe.formats(needs.config)
        for target in needs.targets:
            target.check(formats, needs.geometry)
    except (RecipeError, TargetError):
        return False
    return not recipe.is_calibrated or needs.has_text()


def _keeps_most(config: GemmaConfig, source: Recipe) -> bool:
    shapes = config.tensor_shapes()
    sizes = {name: prod(shapes[name]) for name in source.formats(config)}
    kept = sum(size for name, size in sizes.items() if source.rule(name).rounding == "kept")
    return kept >= _LEAST_KEPT * sum(sizes.values())
