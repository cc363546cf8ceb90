"""Speed and memory, with the state of the machine that they depend on."""

from collections.abc import Callable, Iterator

from gemma_runtime.measure.bench import Benchmark, BundleFigures, Spread
from gemma_runtime.measure.sustained import SPAN_SECONDS, Sustained, rounds, shown_celsius
from gemma_runtime.report.chart import Chart, Form, Panel, Row, Value, draw
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.parts import Part, Section, Table, TableRow, Warning, missing
from gemma_runtime.report.phone import PhoneReport
from gemma_runtime.report.scale import linear
from gemma_runtime.report.sections.phones import phone_parts, sustained_curves
from gemma_runtime.report.sections.prompts import Written, prompt_rows, rate
from gemma_runtime.report.wording import ABSENT, milliseconds, number, percent, size

_LEAD = "Medians; the lines and brackets span the lowest and highest of the repeats."
_Known = list[tuple[Column, BundleFigures]]


def speed(collected: Collected) -> Section:
    benchmarks, sustained = collected.all_of(Benchmark), collected.all_of(Sustained)
    phones = collected.all_of(PhoneReport)
    if not benchmarks and not sustained and not phones:
        command = "gemma-runtime bench BUNDLE… --json > bench.json"
        return missing("speed", "Speed and memory", command)
    parts = [part for one in benchmarks for part in _benchmark(collected, one)]
    parts += [part for one in sustained for part in _sustained(collected, one)]
    parts += phone_parts(collected, phones)
    return Section("speed", "Speed and memory", _LEAD, tuple(parts))


def _benchmark(collected: Collected, benchmark: Benchmark) -> list[Part]:
    found = [(collected.column(one.digest), one) for one in benchmark.bundles]
    known = [(column, one) for column, one in found if column is not None]
    machine = benchmark.machine
    title = f"{machine.cpu}, {benchmark.threads} threads, n = {benchmark.repeats} processes each"
    note = (
        f"Decoding: {benchmark.new_tokens} new tokens. Load average "
        f"{number(benchmark.load_before, '.2f')} before, {number(benchmark.load_after, '.2f')} "
        f"after, on {machine.physical_cores} cores. Memory reads "
        f"{number(benchmark.bandwidth_bytes_per_second / 1e9, '.1f')} GB/s."
    )
    table = Table(
        ("", *(column.label for column, _ in known)),
        tuple(TableRow(label, cells) for label, cells in _rows(known)),
        title,
        note,
    )
    return [*(Warning(text) for text in benchmark.warnings), _chart(known), table]


def _sustained(collected: Collected, sustained: Sustained) -> list[Part]:
    found = [(collected.column(one.digest), one) for one in sustained.bundles]
    known = [(column, one) for column, one in found if column is not None]
    figures = [one for _, one in known]
    rows = (
        ("first span", tuple(rate(one.first) for one in figures)),
        ("last span", tuple(rate(one.last) for one in figures)),
        ("lowest span", tuple(rate(one.lowest) for one in figures)),
        ("last / first", tuple(percent(one.last / one.first, ".0f") for one in figures)),
        ("hottest", tuple(shown_celsius(one.hottest_celsius) for one in figures)),
    )
    table = Table(
        ("", *(column.label for column, _ in known)),
        tuple(TableRow(label, cells) for label, cells in rows),
        f"Decoding for {number(sustained.sustained_minutes, 'g')} minutes, tokens/s",
        f"{sustained.machine.cpu}, {sustained.threads} threads. Spans of "
        f"{number(SPAN_SECONDS, 'g')} seconds; {rounds(sustained)}.",
    )
    charts = sustained_curves(known)
    return [*(Warning(text) for text in sustained.warnings), table, *charts]


def _chart(known: _Known) -> Chart:
    lines = [(c, f.decode_tokens_per_second, f.peak_rss_bytes) for c, f in known]
    rows = [
        Row(
            column.label,
            (
                (_bar(column, decode, lambda x: f"{number(x, '.1f')} tokens/s"),),
                (_bar(column, memory, size),),
            ),
        )
        for column, decode, memory in lines
    ]
    panels = [
        Panel(
            "decoding, tokens/s",
            Form.BARS,
            linear([decode.high for _, decode, _ in lines]),
            lambda x: number(x, "g"),
        ),
        Panel("peak memory", Form.BARS, linear([memory.high for *_, memory in lines]), size),
    ]
    return draw("Decoding speed and peak memory", panels, rows)


def _bar(column: Column, spread: Spread, written: Written) -> Value:
    tip = f"{column.label}: {_spread(spread, written)}"
    return Value(spread.median, tip, column.style, spread.low, spread.high)


def _rows(known: _Known) -> Iterator[tuple[str, tuple[str, ...]]]:
    figures = [one for _, one in known]

    def row(written: Written, get: Callable[[BundleFigures], Spread | None]) -> tuple[str, ...]:
        found = [get(one) for one in figures]
        return tuple(ABSENT if one is None else _spread(one, written) for one in found)

    yield "load, cold", row(milliseconds, lambda f: f.load_cold_ms)
    yield "load, warm", row(milliseconds, lambda f: f.load_ms)
    yield "first token, cold start", row(milliseconds, lambda f: f.first_token_cold_ms)
    yield from prompt_rows(figures, _spread)
    touched = [one.touched_bytes_per_token for one in figures]
    yield "read per token", tuple(ABSENT if one is None else size(one) for one in touched)
    yield "share of bandwidth", tuple(percent(f.bandwidth_share, ".0f") for f in figures)
    yield "peak memory", row(size, lambda f: f.peak_rss_bytes)
    yield "  before loading", row(size, lambda f: f.before_rss_bytes)
    yield "  heap at the end", row(size, lambda f: f.anonymous_bytes)
    yield "  mapped at the end", row(size, lambda f: f.file_bytes)
    yield "artifact", tuple(size(f.artifact_bytes) for f in figures)
    yield "caches", tuple(size(sum(f.cache_bytes.values())) for f in figures)


def _spread(spread: Spread, written: Written) -> str:
    return f"{written(spread.median)} [{written(spread.low)}, {written(spread.high)}]"
