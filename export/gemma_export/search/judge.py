"""Judges cells: which keep to the budget, which are on the Pareto front, and which one to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from gemma_export.search.cells import Cell, Settings
from gemma_export.search.estimate import Estimate
from gemma_export.search.measures import MEASURES, Figures, shown, told, value_of
from gemma_export.search.pareto import Vector, compromise, dominates, front
from gemma_export.search.question import Question
from gemma_runtime.proof.verify import Verdict


class State(StrEnum):
    TAKE = "take"
    FRONT = "front"
    DOMINATED = "dominated"  # another cell is nowhere worse, and somewhere better
    OVER = "over budget"
    FAILED = "failed"
    RULED_OUT = "ruled out"  # before any work
    PLANNED = "planned"


@dataclass(frozen=True, slots=True)
class Result:
    """What is known about a cell."""

    name: str
    model: str
    target: str
    recipe: str
    settings: Settings  # of layout and options, as far as the file has them
    state: State
    reason: str = ""  # why it is in this state
    estimate: Estimate | None = None
    figures: Figures | None = None
    seconds: Mapping[str, float] | None = None  # by stage, of its last run
    is_reused: bool = False  # whether all of it is from an earlier search
    bundle: str | None = None  # its folder, below that of the search
    command: str = ""  # that exports it

    @property
    def is_measured(self) -> bool:
        return self.state in (State.TAKE, State.FRONT, State.DOMINATED, State.OVER)


def result_of(cell: Cell, state: State, reason: str, estimate: Estimate | None) -> Result:
    return Result(
        cell.name, cell.model, cell.target, cell.recipe, cell.settings, state, reason, estimate
    )


def judge(results: Sequence[Result], question: Question) -> tuple[list[Result], str]:
    """The results with their final states, and why the one to take is to be taken.

    The front is that of the cells which keep to the budget.
    """
    judged = [_limited(result, question) for result in results]
    allowed = [
        index
        for index, one in enumerate(judged)
        if one.figures is not None and one.state is State.PLANNED
    ]
    if not allowed:
        return judged, _nothing(judged)
    vectors = {index: _vector(judged[index].figures, question.objectives) for index in allowed}
    best = {allowed[place] for place in front(list(vectors.values()))}
    for index in allowed:
        by = [other for other in sorted(best) if dominates(vectors[other], vectors[index])]
        reason = f"{judged[by[0]].name} is nowhere worse" if by else ""
        state = State.FRONT if index in best else State.DOMINATED
        judged[index] = replace(judged[index], state=state, reason=reason)
    ordered = sorted(best)
    taken = _choose([vectors[index] for index in ordered], bool(question.limits))
    why = _why(judged[ordered[taken]], len(ordered), question)
    judged[ordered[taken]] = replace(judged[ordered[taken]], state=State.TAKE, reason=why)
    return judged, why


def _limited(result: Result, question: Question) -> Result:
    """The result, with a state of its own if it breaks a limit or its bundle is not right."""
    figures = result.figures
    if figures is None:
        return result
    if figures.verdict == Verdict.FAIL:
        reason = "verify: FAIL: the artifact does not compute what its codes say"
        return replace(result, state=State.FAILED, reason=reason)
    broken = [text for name in question.limits if (text := _broken(name, figures, question.limits))]
    return replace(result, state=State.OVER, reason="; ".join(broken)) if broken else result


def _broken(name: str, figures: Figures, limits: Mapping[str, float]) -> str | None:
    """How a limit is broken; None if it is kept."""
    measure, value, limit = MEASURES[name], value_of(figures, name), limits[name]
    if value is not None and measure.oriented(value) <= measure.oriented(limit):
        return None
    return f"{told(name, figures)}, {measure.bound} {shown(name, limit)} asked for"


def _vector(figures: Figures | None, objectives: Sequence[str]) -> Vector:
    assert figures is not None
    values = [(MEASURES[name], value_of(figures, name)) for name in objectives]
    return tuple(m.oriented(value) for m, value in values if value is not None)


def _choose(vectors: Sequence[Vector], has_budget: bool) -> int:
    """With a budget the best of the first objective, else the compromise."""
    if has_budget:
        return min(range(len(vectors)), key=vectors.__getitem__)
    return compromise(vectors)


def _why(result: Result, count: int, question: Question) -> str:
    assert result.figures is not None
    first, *others = question.objectives
    figures = [told(name, result.figures) for name in (first, *others)]
    if not question.limits:
        best = f"nearest to the best of every objective, of {count} bundles on the front"
        return f"{best if count > 1 else 'it alone is on the front'}: {', '.join(figures)}"
    best = "highest" if MEASURES[first].is_better_high else "lowest"
    kept = [
        f"{told(name, result.figures)} of {shown(name, limit)}"
        for name, limit in question.limits.items()
        if name != first
    ]
    of = f"of {count} bundles on the front" if count > 1 else "and alone on the front"
    return "; ".join([f"{best} {figures[0]} {of} within the budget", *kept])


def _nothing(results: Sequence[Result]) -> str:
    counts = {state: sum(one.state is state for one in results) for state in State}
    found = [f"{count} {state}" for state, count in counts.items() if count]
    return f"no bundle to take: of {len(results)} cells, {', '.join(found)}"
