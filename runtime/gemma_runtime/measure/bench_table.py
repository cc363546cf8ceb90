"""Renders a benchmark as a table: one row per figure, one column per bundle."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemma_runtime.machine import Machine, format_bytes
from gemma_runtime.measure.bench import (
    DECODE_PROMPT,
    Benchmark,
    BundleFigures,
    Spread,
    prompt_lengths,
    prompt_of,
)


def render_benchmark(benchmark: Benchmark) -> RenderableType:
    """The figures with ratios to the first bundle; below them the machine and the warnings."""
    table = Table(
        title=f"medians of {benchmark.repeats}, each in a fresh process; low – high",
        title_justify="left",
    )
    table.add_column("")
    for bundle in benchmark.bundles:
        # Text, not str: rich would parse brackets in a folder's name as markup.
        table.add_column(Text(f"{Path(bundle.bundle).name}\n{bundle.model} {bundle.recipe}"))
    for label, cell in _rows(benchmark):
        table.add_row(label, *(cell(bundle) for bundle in benchmark.bundles))
    notes = [Text(line, style="dim") for line in _notes(benchmark)]
    return Group(table, *notes, *(Text(text, style="yellow") for text in benchmark.warnings))


_Row = tuple[str, Callable[[BundleFigures], str]]
_NO_ROOM = "does not fit"


def _rows(benchmark: Benchmark) -> list[_Row]:
    kinds = benchmark.bundles[0].cache_bytes
    rows: list[_Row] = [
        _row("load, cold", "load_cold_ms", _ms),
        _row("load, warm", "load_ms", _ms),
        _row("first token, cold start", "first_token_cold_ms", _ms),
        _row("check digests", "check_ms", _ms),
    ]
    lengths = prompt_lengths(benchmark.bundles)
    rows += [(f"first token, {length}", _prompt_cell(length)) for length in lengths]
    rows += [(f"decode after {length}", _decode_cell(length)) for length in lengths]
    return [
        *rows,
        _row("new token, median", "token_ms", _ms),
        _row("new token, p95", "token_p95_ms", _ms),
        ("stored per token", lambda bundle: format_bytes(bundle.bytes_per_token)),
        ("read per token", lambda bundle: _touched(bundle.touched_bytes_per_token)),
        ("share of bandwidth", lambda bundle: f"{bundle.bandwidth_share:.0%}"),
        ("artifact", lambda bundle: format_bytes(bundle.artifact_bytes)),
        *(_cache_row(kind) for kind in kinds),
        _row("peak memory", "peak_rss_bytes", format_bytes),
        _row("  before loading", "before_rss_bytes", format_bytes),
        _row("  heap at the end", "anonymous_bytes", format_bytes),
        _row("  mapped at the end", "file_bytes", format_bytes),
    ]


def _row(label: str, name: str, unit: Callable[[float], str]) -> _Row:
    def cell(bundle: BundleFigures) -> str:
        figure: Spread | None = getattr(bundle, name)
        return "unknown" if figure is None else _spread(figure, unit, bundle.ratios.get(name))

    return label, cell


def _touched(count: int | None) -> str:
    return "not told" if count is None else format_bytes(count)


def _prompt_cell(length: int) -> Callable[[BundleFigures], str]:
    def cell(bundle: BundleFigures) -> str:
        prompt = prompt_of(bundle, length)
        if prompt is None:
            return _NO_ROOM
        ratio = bundle.ratios.get(f"first_token_ms_{length}")
        rate = _tokens_per_second(prompt.tokens_per_second.median)
        return f"{_spread(prompt.first_token_ms, _ms, ratio)}, {rate}"

    return cell


def _decode_cell(length: int) -> Callable[[BundleFigures], str]:
    def cell(bundle: BundleFigures) -> str:
        prompt = prompt_of(bundle, length)
        if prompt is None or prompt.decode_tokens_per_second is None:
            return _NO_ROOM
        ratio = bundle.ratios.get(f"decode_tokens_per_second_{length}")
        return _spread(prompt.decode_tokens_per_second, _tokens_per_second, ratio)

    return cell


def _cache_row(kind: str) -> _Row:
    return f"cache, {kind} layers", lambda bundle: format_bytes(bundle.cache_bytes[kind])


def _spread(figure: Spread, unit: Callable[[float], str], ratio: float | None) -> str:
    text = f"{unit(figure.median)} ({unit(figure.low)} – {unit(figure.high)})"
    return text if ratio in (None, 1.0) else f"{text} ×{ratio:.2f}"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _tokens_per_second(value: float) -> str:
    return f"{value:.1f} tokens/s"


def _notes(benchmark: Benchmark) -> list[str]:
    first = benchmark.bundles[0]
    return [
        describe(benchmark.machine, benchmark.threads),
        f"load {benchmark.load_before:.2f} before, {benchmark.load_after:.2f} after; memory reads "
        f"{benchmark.bandwidth_bytes_per_second / 1e9:.1f} GB/s with these threads",
        f"decode: {benchmark.new_tokens} new tokens, greedy; new token: after {DECODE_PROMPT} "
        "tokens, or as many as leave room; cold: the artifact's files dropped from the page cache "
        "with posix_fadvise",
        f"ratios (×) are to {Path(first.bundle).name}",
    ][: 3 if len(benchmark.bundles) == 1 else 4]


def describe(machine: Machine, threads: int) -> str:
    """The machine in one line."""
    runtimes = [f"{name} {found or 'not installed'}" for name, found in machine.runtimes.items()]
    return (
        f"{machine.cpu}, {machine.physical_cores} cores, {threads} threads, "
        f"{format_bytes(machine.memory_bytes)}, {machine.system}, "
        + ", ".join([f"Python {machine.python}", *runtimes])
    )
