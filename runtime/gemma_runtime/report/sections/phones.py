"""Speed on phones, and how it holds up over minutes: what the apps measured."""

from collections.abc import Iterator

from gemma_runtime.measure.sustained import SustainedFigures
from gemma_runtime.report.chart import Chart
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.curve import Curve, Line, Note, draw_curves
from gemma_runtime.report.parts import Part, Table, TableRow
from gemma_runtime.report.phone import PhoneReport, PhoneSustained
from gemma_runtime.report.wording import ABSENT, milliseconds, number, percent, size


def phone_parts(collected: Collected, report: PhoneReport) -> list[Part]:
    column = collected.column(report.digest)
    if column is None:
        return []
    about = ", ".join(f"{key}: {value}" for key, value in sorted(report.device.items()))
    rows = tuple(TableRow(label, (cell,)) for label, cell in _rows(report))
    parts: list[Part] = [Table(("", column.label), rows, f"On a phone: {_name(report)}", about)]
    if report.sustained is not None and report.sustained.spans:
        parts.append(_phone_curves(column, report.sustained, _name(report)))
    return parts


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


def _rows(report: PhoneReport) -> Iterator[tuple[str, str]]:
    if (verify := report.verify) is not None:
        yield "verdict", "; ".join([verify.verdict, *verify.failures])
        yield "mean KL of the lowering, nats", number(verify.lowering.mean_kl, ".1e")
    if (bench := report.bench) is not None:
        for speed in bench.bundles:
            yield "load", milliseconds(speed.load_ms.median)
            for prompt in speed.prompts:
                first = milliseconds(prompt.first_token_ms.median)
                yield f"first token, prompt of {prompt.tokens}", first
            yield "decoding, tokens/s", number(speed.decode_tokens_per_second.median, ".1f")
            yield "new token, p95", milliseconds(speed.token_p95_ms.median)
            peak = speed.peak_rss_bytes
            yield "peak memory", ABSENT if peak is None else size(peak.median)
    if (sustained := report.sustained) is not None:
        rates = (sustained.first, sustained.last, sustained.lowest)
        for name, rate in zip(("first", "last", "lowest"), rates, strict=True):
            yield f"{name} span, tokens/s", number(rate, ".1f")
        kept = sustained.last / sustained.first if sustained.first else 0.0
        yield "last / first", percent(kept, ".0f")
