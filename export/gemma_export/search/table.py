"""Shows a search on the console."""

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gemma_export.plan_table import duration
from gemma_export.search.estimate import Estimate
from gemma_export.search.judge import Result, State
from gemma_export.search.measures import MEASURES, figure, shown, value_of
from gemma_export.search.run import Search
from gemma_runtime.machine import format_bytes

_ORDER = tuple(State)  # the order of the rows: the one to take first
_STYLES = {State.TAKE: "bold green", State.FRONT: "green"}
CHOSEN = (State.TAKE, State.FRONT)
REFUSED = (State.OVER, State.FAILED, State.RULED_OUT)


def render_plan(search: Search) -> list[RenderableType]:
    """What each cell will take, and why some get no work."""
    names = labels(search.cells)
    table = Table("cell", "bits", "artifact", "memory", "export", "in memory", box=None)
    for result in search.cells:
        if result.estimate is not None and result.state is State.PLANNED:
            table.add_row(*map(Text, (names[result.name], *_estimated(result.estimate))))
    dim = Text(f"{search.why}; estimates, nothing was measured", style="dim")
    return [table, *_reasons(search), dim]


def _estimated(estimate: Estimate) -> Sequence[str]:
    return (
        f"{estimate.bits_per_weight:.2f}",
        format_bytes(estimate.size),
        format_bytes(estimate.resident),
        f"about {duration(estimate.export_seconds)}",
        format_bytes(estimate.export_peak),
    )


def render_search(search: Search) -> list[RenderableType]:
    """A table of the measured cells, the one to take first, and why it is taken."""
    names, told = labels(search.cells), _told(search)
    table = Table("cell", *(MEASURES[name].title for name in told), "", box=None)
    for result in ordered(search.cells):
        if result.is_measured:
            cells = (names[result.name], *values(result, told), result.state.value)
            style = _STYLES.get(result.state, "")
            table.add_row(*(Text(cell, style=style) for cell in cells))
    warnings = [Text(f"warning: {text}", style="yellow") for text in search.warnings]
    tables = [table] if table.row_count else []
    return [*tables, *_reasons(search), *warnings, Text(taking(search), style="bold")]


def _told(search: Search) -> list[str]:
    """The objectives, and beside a mean over languages the worst of them."""
    evaluated = any(one.figures and one.figures.worst_kl is not None for one in search.cells)
    return list(dict.fromkeys([*search.objectives, *(["worst_kl"] if evaluated else [])]))


def _reasons(search: Search) -> list[Text]:
    """Why cells failed, are over the budget, or were ruled out; the same reason once."""
    names = labels(search.cells)
    told: dict[tuple[State, str], list[str]] = {}
    for one in ordered(search.cells):
        if one.state in REFUSED:
            told.setdefault((one.state, one.reason), []).append(names[one.name])
    return [Text(f"{state}: {', '.join(of)}: {why}") for (state, why), of in told.items()]


def labels(results: Sequence[Result]) -> Mapping[str, str]:
    """What tells each cell from the others: recipe and target, and other choices that differ."""
    parts = {one.name: _parts(one) for one in results}
    keys = list(dict.fromkeys(key for told in parts.values() for key in told))
    chosen = [
        key
        for key in keys
        if key in ("recipe", "target") or len({told.get(key) for told in parts.values()}) > 1
    ]
    named = {
        name: " ".join(told[key] for key in chosen if key in told) for name, told in parts.items()
    }
    texts = list(named.values())
    return {name: text if texts.count(text) == 1 else name for name, text in named.items()}


def _parts(result: Result) -> Mapping[str, str]:
    settings = {key: f"{key} {value}" for key, value in result.settings.items()}
    return {"model": result.model, "recipe": result.recipe, "target": result.target, **settings}


def taking(search: Search) -> str:
    """The answer in one sentence."""
    return f"take {search.take}: {search.why}" if search.take else search.why


def columns(search: Search) -> list[str]:
    """Objectives first, then what else was measured."""
    known = [
        name
        for name in MEASURES
        if any(one.figures and value_of(one.figures, name) is not None for one in search.cells)
    ]
    return [*search.objectives, *(name for name in known if name not in search.objectives)]


def values(result: Result, names: Sequence[str]) -> list[str]:
    figures = result.figures
    return [shown(name, None) if figures is None else figure(name, figures) for name in names]


def ordered(results: Sequence[Result]) -> list[Result]:
    """By state, the one to take first."""
    return sorted(results, key=lambda result: _ORDER.index(result.state))
