"""Recipes that keep a source's own codes, answered by the source, tensor by tensor."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.prequantized import Prequantized, Stored
from gemma_export.quantize.recipe import Recipe, Rule
from gemma_runtime.errors import CheckpointError

_NAMED = 4  # tensors in an error line or a note; the rest is counted


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe with every `kept` answered."""

    recipe: Recipe
    notes: tuple[str, ...]
    rounded: Mapping[str, str]  # tensor that is not what the source holds → how it was held


def resolve_recipe(recipe: Recipe, checkpoint: Checkpoint) -> Resolved:
    """Ask the source, tensor by tensor, for what a recipe wants to keep.

    A rule of its own for each tensor of a `kept` rule: the source's format, or the rule's rounded.
    """
    names = list(recipe.formats(checkpoint.config))
    stored = {name: _stored(checkpoint, name) for name in names}
    if not any(recipe.rule(name).rounding == "kept" for name in names):
        lost = {n: s.kind for n, s in stored.items() if not recipe.rule(n).format.is_float}
        return Resolved(recipe, _hint(stored), lost)
    rules = tuple(_rule(recipe.rule(name), name, stored[name]) for name in names)
    rounded = {
        rule.pattern: stored[rule.pattern].kind
        for rule in rules
        if not (rule.format.is_float or (rule.rounding == "kept" and stored[rule.pattern].is_exact))
    }
    kept = Counter(stored[rule.pattern].kind for rule in rules if rule.rounding == "kept")
    return Resolved(replace(recipe, rules=rules), _notes(kept, rounded, stored), rounded)


def require_exact(resolved: Resolved) -> None:
    """Raise CheckpointError, naming tensors, if any would not be what the source holds."""
    if resolved.rounded:
        raise CheckpointError(
            f"--require-exact: {len(resolved.rounded)} tensors would be rounded again: "
            f"{_list(resolved.rounded)}; --quant source keeps codes where a grid takes them"
        )


def _stored(checkpoint: Checkpoint, name: str) -> Stored:
    return checkpoint.stored(name) if isinstance(checkpoint, Prequantized) else Stored("float32")


def _rule(rule: Rule, name: str, stored: Stored) -> Rule:
    if rule.rounding != "kept":
        return replace(rule, pattern=name)
    if stored.format is None:
        return Rule(name, rule.format, "nearest")
    return Rule(name, stored.format, "kept")


def _hint(stored: Mapping[str, Stored]) -> tuple[str, ...]:
    kinds = Counter(s.kind for s in stored.values() if s.format is not None and s.is_exact)
    if not kinds:
        return ()
    return (
        f"the source holds codes ({_kinds(kinds)}) that this recipe rounds again; "
        "--quant source keeps them",
    )


def _notes(
    kept: Mapping[str, int], rounded: Mapping[str, str], stored: Mapping[str, Stored]
) -> tuple[str, ...]:
    notes = [f"codes kept as they are: {_kinds(kept)}"] if kept else []
    inexact = {n: k for n, k in rounded.items() if stored[n].format is not None}
    if inexact:
        notes.append(f"codes kept, scales rounded to float16: {_list(inexact)}")
    if again := {n: k for n, k in rounded.items() if n not in inexact}:
        notes.append(f"rounded again, since no grid takes what the source holds: {_list(again)}")
    return tuple(notes)


def _kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _list(tensors: Mapping[str, str]) -> str:
    shown = [f"{name} ({kind})" for name, kind in list(tensors.items())[:_NAMED]]
    more = len(tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
