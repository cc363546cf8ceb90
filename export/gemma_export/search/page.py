"""The page of a search: the answer, plots of its objectives, and all cells."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from gemma_export.plan_table import duration
from gemma_export.search.judge import Result, State
from gemma_export.search.measures import MEASURES, shown
from gemma_export.search.plot import DOTS, scatter
from gemma_export.search.run import Search
from gemma_export.search.table import (
    CHOSEN,
    REFUSED,
    columns,
    labels,
    ordered,
    taking,
    values,
)
from gemma_runtime.report.page import Data, render_sections, script_json
from gemma_runtime.report.parts import (
    Commands,
    Key,
    Legend,
    Part,
    Section,
    Table,
    TableRow,
    Warning,
)
from gemma_runtime.report.sections.summary import Card
from gemma_runtime.report.wording import ABSENT

_KEYS = {
    State.TAKE: "take this one",
    State.FRONT: "on the front",
    State.DOMINATED: "another is nowhere worse",
    State.OVER: "over budget",
}
_PLOTS = "Each dot is a bundle. The line is the front of these two measures alone."
_TIMES = "Speed and memory were measured one bundle at a time, on the machine below."


def render_page(search: Search) -> bytes:
    """The page as UTF-8. The same search gives the same bytes."""
    sections = (_plots(search), _table(search), _rest(search), _commands(search))
    return render_sections(
        title=f"Search {search.file}",
        verdict=_sentence(taking(search)),
        cards=_cards(search),
        sections=[section for section in sections if section is not None],
        data=[Data("search", search.file, script_json(search))],
        generator="gemma-export search",
    )


def _cards(search: Search) -> list[Card]:
    """The bundle to take, and the others on the front."""
    chosen = [one for one in ordered(search.cells) if one.state in CHOSEN]
    names, called = columns(search), labels(search.cells)
    return [_card(result, names, called[result.name]) for result in chosen]


def _card(result: Result, names: Sequence[str], called: str) -> Card:
    titles = [MEASURES[name].title for name in names]
    style, form = DOTS[result.state]
    facts = tuple(zip(titles, values(result, names), strict=True))
    return Card(called, style, form, result.state.value, facts)


def _plots(search: Search) -> Section | None:
    shown_cells = [one for one in search.cells if one.is_measured]
    pairs = list(combinations(search.objectives, 2))
    if not pairs or not shown_cells:
        return None
    used, names = {one.state for one in shown_cells}, labels(search.cells)
    keys = tuple(Key(_KEYS[state], *DOTS[state]) for state in _KEYS if state in used)
    # The first objective goes up: quality over memory, over speed.
    charts = [scatter(shown_cells, names, across=other, up=first) for first, other in pairs]
    return Section("front", "Front", _PLOTS, (Legend(keys), *charts))


def _table(search: Search) -> Section:
    names, called = columns(search), labels(search.cells)
    head = ("", *(MEASURES[name].title for name in names), "bits", "export", "verify", "")
    rows = [
        TableRow(called[one.name], (*values(one, names), *_more(one)), _is_quiet(one))
        for one in ordered(search.cells)
        if one.is_measured
    ]
    parts: list[Part] = [Warning(text) for text in search.warnings]
    note = f"{search.machine.cpu}, {search.machine.system}. {_budget(search)}"
    parts.append(Table(head, tuple(rows), note=note))
    return Section("cells", "Bundles", _TIMES, tuple(parts))


def _is_quiet(result: Result) -> bool:
    return result.state in (State.DOMINATED, State.OVER)


def _more(result: Result) -> tuple[str, str, str, str]:
    figures, seconds = result.figures, result.seconds or {}
    assert figures is not None
    took = duration(seconds["export"]) if "export" in seconds else ABSENT
    bits = f"{figures.bits_per_weight:.2f}"
    return bits, took, figures.verdict or ABSENT, result.state.value


def _budget(search: Search) -> str:
    if not search.limits:
        return "There was no budget."
    told = (
        f"{MEASURES[name].title} {MEASURES[name].bound} {shown(name, limit)}"
        for name, limit in search.limits.items()
    )
    return f"Budget: {', '.join(told)}."


def _rest(search: Search) -> Section | None:
    """Cells without figures, or over the budget, and why."""
    rows = tuple(_reasons(search))
    if not rows:
        return None
    table = Table(("", "", "why"), rows, wraps=True)
    return Section("others", "Not to take", "", (table,))


def _reasons(search: Search) -> Iterator[TableRow]:
    called = labels(search.cells)
    for one in ordered(search.cells):
        if one.state in REFUSED:
            yield TableRow(called[one.name], (one.state.value, one.reason))


def _commands(search: Search) -> Section | None:
    lines = tuple(one.command for one in ordered(search.cells) if one.state in CHOSEN)
    if not lines:
        return None
    return Section("reproduce", "How to make them again", "", (Commands(lines),))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
