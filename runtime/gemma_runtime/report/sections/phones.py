"""Speed on phones, and how it holds up over minutes: what the apps measured."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from gemma_runtime.measure.bench import Spread
from gemma_runtime.measure.sustained import SustainedFigures
from gemma_runtime.report.chart import Chart
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.curve import Curve, Line, Note, draw_curves
from gemma_runtime.report.parts import Part, Table, TableRow
from gemma_runtime.report.phone import (
    PhoneCondition,
    PhoneReport,
    PhoneSustained,
    PhoneVerdict,
)
from gemma_runtime.report.sections.prompts import Written, prompt_rows
from gemma_runtime.report.wording import ABSENT, milliseconds, number, percent, size

T = TypeVar("T")


def phone_parts(collected: Collected, reports: Sequence[PhoneReport]) -> Iterator[Part]:
    """One table with a column for each report, to compare phones; then their curves."""
    found = [(collected.column(report.digest), report) for report in reports]
    known = [(column, report) for column, report in found if column is not None]
    if not known:
        return
    shown = [report for _, report in known]
    title = f"On a phone: {_name(shown[0])}" if len(shown) == 1 else "On phones"
    head = ("", *(f"{_name(report)}: {column.label}" for column, report in known))
    rows = tuple(TableRow(label, cells) for label, cells in _rows(shown) if set(cells) != {ABSENT})
    yield Table(head, rows, title, "; ".join(dict.fromkeys(map(_about, shown))))
    for column, report in known:
        if report.sustained is not None and report.sustained.spans:
            yield _phone_curves(column, report.sustained, _name(report))


def sustained_curves(known: list[tuple[Column, SustainedFigures]]) -> Iterator[Chart]:
    """The rate of every bundle over time, and the processor's temperature where it is told."""
    lines, hot = [], []
    for column, one in known:
        rates = tuple((span.seconds, span.tokens_per_second) for span in one.spans)
        lines.append(Line(column.style, rates, column.label))
        told = tuple((s.seconds, s.celsius) for s in one.spans if s.celsius is not None)
        hot += [Line(column.style, told, column.label)] if told else []
    if lines:
        curves = [Curve("decoding, tokens/s", tuple(lines), lambda x: number(x, "g"))]
        curves += [Curve("processor, °C", tuple(hot), lambda x: number(x, "g"))] if hot else []
        yield draw_curves("Decoding speed over time", curves)


def _phone_curves(column: Column, sustained: PhoneSustained, name: str) -> Chart:
    spans = sustained.spans
    rates = tuple((span.seconds, span.tokens_per_second) for span in spans)
    memory = tuple((s.seconds, float(s.memory_bytes)) for s in spans if s.memory_bytes is not None)
    curves = [
        Curve(
            f"decoding for {number(sustained.sustained_minutes, 'g')} minutes, tokens/s",
            (Line(column.style, rates, f"{column.label} on {name}"),),
            lambda x: number(x, "g"),
        )
    ]
    if memory:
        curves.append(Curve("memory of the app", (Line(column.style, memory, column.label),), size))
    return draw_curves(f"Decoding speed over time on {name}", curves, list(_thermal(sustained)))


def _thermal(sustained: PhoneSustained) -> Iterator[Note]:
    """Where the phone's word for its temperature changed."""
    before = None
    for span in sustained.spans:
        if span.thermal is not None and span.thermal != before:
            yield Note(span.seconds, span.thermal)
        before = span.thermal


def _name(report: PhoneReport) -> str:
    parts = (report.device.get(key) for key in ("manufacturer", "model"))
    return " ".join(part for part in parts if part) or "a phone"


def _about(report: PhoneReport) -> str:
    facts = ", ".join(f"{key}: {value}" for key, value in report.facts().items())
    return f"{_name(report)}: {facts}"


def _rows(reports: Sequence[PhoneReport]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Labels, and a cell for each report."""
    for key, label in (
        ("runtime", "runtime"),
        ("threads", "threads"),
        ("compute_units", "runs on"),
    ):
        yield label, tuple(report.device.get(key, ABSENT) for report in reports)
    for moment in ("start", "end"):
        yield f"at the {moment}", tuple(_told(report.condition(moment)) for report in reports)
    verdicts = [report.verify for report in reports]
    yield "verdict", tuple(_cell(one, _verdict) for one in verdicts)
    yield (
        "mean KL of the lowering, nats",
        tuple(_cell(one, lambda v: number(v.lowering.mean_kl, ".1e")) for one in verdicts),
    )
    speeds = [next(iter(r.bench.bundles), None) if r.bench else None for r in reports]
    yield "load", tuple(_cell(one, lambda s: _median(s.load_ms, milliseconds)) for one in speeds)
    yield from prompt_rows(speeds, _median)
    peaks = [None if one is None else one.peak_rss_bytes for one in speeds]
    yield "peak memory", tuple(_cell(one, lambda peak: _median(peak, size)) for one in peaks)
    sustained = [report.sustained for report in reports]
    for name in ("first", "last", "lowest"):
        rates = (None if one is None else getattr(one, name) for one in sustained)
        yield f"{name} span, tokens/s", tuple(number(rate, ".1f") for rate in rates)
    yield "last / first", tuple(_cell(one, _kept) for one in sustained)


def _cell(value: T | None, written: Callable[[T], str]) -> str:
    return ABSENT if value is None else written(value)


def _median(spread: Spread, written: Written) -> str:
    return written(spread.median)


def _verdict(verify: PhoneVerdict) -> str:
    return "; ".join([verify.verdict, *verify.failures])


def _kept(sustained: PhoneSustained) -> str:
    return percent(sustained.last / sustained.first if sustained.first else 0.0, ".0f")


def _told(condition: PhoneCondition) -> str:
    """`battery 80 %, charging, thermal: none`; a dash if the phone said nothing."""
    parts = []
    if condition.battery_percent is not None:
        parts.append(f"battery {condition.battery_percent} %")
    if condition.charging is not None:
        parts.append("charging" if condition.charging else "not charging")
    if condition.power_save:
        parts.append("saving power")
    if condition.thermal is not None:
        parts.append(f"thermal: {condition.thermal}")
    return ", ".join(parts) or ABSENT
