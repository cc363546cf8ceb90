"""How often replies were JSON of a schema."""

from gemma_runtime.report.chart import Chart, Form, Panel, Row, Value, draw
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.figures import StructuredRate
from gemma_runtime.report.legend import bundles_legend
from gemma_runtime.report.parts import Part, Section, Table, TableRow, missing
from gemma_runtime.report.scale import SHARE
from gemma_runtime.report.wording import count, number, percent, wilson

_Known = list[tuple[Column, tuple[StructuredRate, ...]]]
_LEAD = (
    "Replies that are JSON of the schema asked for. Lines are Wilson's 95 % intervals of the share."
    " With a constraint, only a limit on the length can make a reply invalid."
)


def structure(collected: Collected) -> Section:
    found = collected.structured()
    known = [(c, found[c.digest].rates) for c in collected.columns if c.digest in found]
    if not known:
        command = "python benchmarks/structured.py BUNDLE --json > structured.json"
        return missing("structure", "Structured replies", command)
    parts: list[Part] = [
        *bundles_legend([column for column, _ in known]),
        _chart(known),
        *(_table(column, rates) for column, rates in known),
    ]
    return Section("structure", "Structured replies", _LEAD, tuple(parts))


def _chart(known: _Known) -> Chart:
    names = list(dict.fromkeys(_name(rate) for _, rates in known for rate in rates))
    rows = [
        Row(
            name,
            (
                tuple(
                    _bar(column, rate, stripe)
                    for stripe, (column, rates) in enumerate(known)
                    for rate in rates
                    if _name(rate) == name and rate.requests > 0
                ),
            ),
        )
        for name in names
    ]
    panel = Panel("valid replies, share of n", Form.BARS, SHARE, lambda x: percent(x, ".0f"))
    return draw("Valid replies", [panel], rows)


def _bar(column: Column, rate: StructuredRate, stripe: int) -> Value:
    tip = f"{column.label}, {_name(rate)}: {rate.valid} of {rate.requests}"
    low, high = wilson(rate.valid, rate.requests)
    return Value(rate.valid / rate.requests, tip, column.style, low, high, stripe)


def _name(rate: StructuredRate) -> str:
    return f"{rate.way}, T {number(rate.temperature, 'g')}"


def _table(column: Column, rates: tuple[StructuredRate, ...]) -> Table:
    head = ("", "valid of n", "95 %", "at once", "wrong JSON", "no JSON", "tokens", "model calls")
    rows = tuple(TableRow(_name(rate), _cells(rate)) for rate in rates)
    return Table(head, rows, column.label)


def _cells(rate: StructuredRate) -> tuple[str, ...]:
    low, high = wilson(rate.valid, rate.requests)
    return (
        f"{rate.valid} of {rate.requests}",
        f"{percent(low, '.0f')} – {percent(high, '.0f')}",
        str(rate.valid_at_once),
        str(rate.wrong),
        str(rate.none),
        count(rate.new_tokens),
        count(rate.model_calls),
    )
