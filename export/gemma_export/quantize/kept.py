"""Resolves recipes that keep the codes of a quantized checkpoint."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.prequantized import Prequantized, Stored
from gemma_export.quantize.recipe import Recipe, Rule
from gemma_runtime.errors import CheckpointError

_NAMED = 4  # most tensors listed in an error or a note; the others are counted


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe in which each `kept` matrix has a rule of its own."""

    recipe: Recipe
    notes: tuple[str, ...]
    rounded: Mapping[str, str]  # tensor that is not kept exactly → its kind in the source


def resolve_recipe(recipe: Recipe, checkpoint: Checkpoint) -> Resolved:
    """Replace the recipe's `kept` rules by one rule per matrix.

    The rule keeps the source's codes if we can store their format, else rounds to the old rule's
    format.
    """
    names = list(recipe.formats(checkpoint.config))
    stored = {name: _stored(checkpoint, name) for name in names}
    if not any(recipe.rule(name).rounding == "kept" for name in names):
        lost = {n: s for n, s in stored.items() if not recipe.rule(n).format.is_float}
        return Resolved(recipe, _hint(lost), {n: s.kind for n, s in lost.items()})
    rules = tuple(_rule(recipe.rule(name), name, stored[name]) for name in names)
    rounded = {
        rule.pattern: stored[rule.pattern].kind
        for rule in rules
        if not (rule.format.is_float or (rule.rounding == "kept" and stored[rule.pattern].is_exact))
    }
    kept = Counter(stored[rule.pattern].kind for rule in rules if rule.rounding == "kept")
    return Resolved(replace(recipe, rules=rules), _notes(kept, rounded, stored), rounded)


def require_exact(resolved: Resolved) -> None:
    """Raise CheckpointError, with tensor names, if any tensor would not be kept exactly."""
    if resolved.rounded:
        raise CheckpointError(
            f"--require-exact: {len(resolved.rounded)} tensors would be rounded again: "
            f"{_list(resolved.rounded)}; --quant source keeps all codes that can be kept"
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
        f"this recipe rounds the checkpoint's quantized weights ({_kinds(kinds)}) again; "
        "--quant source keeps them",
    )


def _notes(
    kept: Mapping[str, int], rounded: Mapping[str, str], stored: Mapping[str, Stored]
) -> tuple[str, ...]:
    notes = [f"codes kept: {_kinds(kept)}"] if kept else []
    inexact = {n: k for n, k in rounded.items() if stored[n].format is not None}
    for loss in dict.fromkeys(stored[name].loss for name in inexact):
        lossy = {n: k for n, k in inexact.items() if stored[n].loss == loss}
        notes.append(f"codes kept, {loss}: {_list(lossy)}")
    if again := {n: k for n, k in rounded.items() if n not in inexact}:
        notes.append(f"rounded again, because none of our formats matches: {_list(again)}")
    return tuple(notes)


def _kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _list(tensors: Mapping[str, str]) -> str:
    shown = [f"{name} ({kind})" for name, kind in list(tensors.items())[:_NAMED]]
    more = len(tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
