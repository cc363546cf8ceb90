"""Measures how decoding speed holds up over minutes, as a machine without a fan may slow down.

Rounds of a prompt and new tokens follow one another, so that every span sees the same lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.machine import (
    Machine,
    check_threads,
    describe_machine,
    load_average,
    physical_cores,
    processor_celsius,
)
from gemma_runtime.measure.bench import busy_warnings, fit_workload
from gemma_runtime.measure.bench_table import describe
from gemma_runtime.measure.bench_worker import Clock, Workload, random_tokens
from gemma_runtime.session import Session, open_session

SPAN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Span:
    """A few seconds of decoding. The time of prompts is not in its rate."""

    seconds: float  # from the start to its end
    tokens_per_second: float
    celsius: float | None  # of the processor at its end; None if the system doesn't tell


@dataclass(frozen=True, slots=True)
class SustainedFigures:
    bundle: str
    digest: str  # `Bundle.digest`
    model: str
    recipe: str
    target: str
    prompt_tokens: int  # of each round
    new_tokens: int  # of all rounds
    first: float  # tokens per second in the first span
    last: float
    lowest: float
    hottest_celsius: float | None
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Sustained:
    machine: Machine
    threads: int
    sustained_minutes: float
    round_tokens: int  # new tokens of each round
    load_before: float
    load_after: float
    bundles: tuple[SustainedFigures, ...]
    warnings: tuple[str, ...]


Progress = Callable[[str], None]


def measure_sustained(
    directories: Sequence[Path],
    *,
    minutes: float,
    threads: int | None = None,
    new_tokens: int = 64,
    on_progress: Progress = lambda text: None,
) -> Sustained:
    """Decode with each bundle for some minutes, one after the other.

    Raises BundleError or SessionError if one can't run.
    """
    check_threads(threads)
    threads = threads or physical_cores()
    bundles = [open_bundle(directory) for directory in directories]
    workloads = [fit_workload(bundle.manifest, threads, new_tokens) for bundle in bundles]
    load_before = load_average()
    figures = tuple(
        _measure(bundle, workload, minutes * 60, on_progress)
        for bundle, workload in zip(bundles, workloads, strict=True)
    )
    warm = ("later bundles start on a machine that earlier ones have warmed up",)
    return Sustained(
        machine=describe_machine(chain.from_iterable(b.manifest.target.packages for b in bundles)),
        threads=threads,
        sustained_minutes=minutes,
        round_tokens=new_tokens,
        load_before=load_before,
        load_after=load_average(),
        bundles=figures,
        warnings=(*busy_warnings(load_before), *warm[: len(bundles) - 1]),
    )


def sustain(
    session: Session,
    vocab_size: int,
    workload: Workload,
    seconds: float,
    *,
    clock: Clock = perf_counter,
    celsius: Callable[[], float | None] = processor_celsius,
    on_span: Callable[[Span], None] = lambda span: None,
) -> tuple[int, tuple[Span, ...]]:
    """Decode for some seconds; returns the number of new tokens, and the rate span by span.

    The last span is left out if it is shorter than half of the others, unless it is the only one.
    """
    spans: list[Span] = []
    prompt = random_tokens(vocab_size, workload.decode_prompt)
    session.prefill(prompt)  # untimed: the first call is slower
    started = since = clock()
    total, tokens, decoding = 0, 0, 0.0
    while (now := clock()) - started < seconds:
        if total % workload.new_tokens == 0:
            session.reset()
            token = int(session.prefill(prompt).argmax())
        before = clock()
        token = int(session.decode(token).argmax())
        now = clock()
        total, tokens, decoding = total + 1, tokens + 1, decoding + now - before
        if now - since >= SPAN_SECONDS:
            spans.append(Span(now - started, tokens / decoding, celsius()))
            on_span(spans[-1])
            since, tokens, decoding = now, 0, 0.0
    if tokens and (not spans or now - since >= SPAN_SECONDS / 2):
        spans.append(Span(now - started, tokens / decoding, celsius()))
    return total, tuple(spans)


def render_sustained(sustained: Sustained) -> RenderableType:
    """The first, last and lowest rate of each bundle; below them the machine and the warnings."""
    table = Table(
        title=f"decoding for {sustained.sustained_minutes:g} minutes, tokens/s in spans of "
        f"{SPAN_SECONDS:g} s",
        title_justify="left",
    )
    for head in ("", "first", "last", "lowest", "last / first", "hottest"):
        table.add_column(head)
    for one in sustained.bundles:
        rates = (f"{rate:.1f}" for rate in (one.first, one.last, one.lowest))
        kept, hottest = f"{one.last / one.first:.0%}", shown_celsius(one.hottest_celsius)
        table.add_row(Text(Path(one.bundle).name), *rates, kept, hottest)
    notes = (
        describe(sustained.machine, sustained.threads),
        f"{rounds(sustained)}, greedy; load {sustained.load_before:.2f} before, "
        f"{sustained.load_after:.2f} after",
    )
    dim = [Text(line, style="dim") for line in notes]
    return Group(table, *dim, *(Text(text, style="yellow") for text in sustained.warnings))


def rounds(sustained: Sustained) -> str:
    prompts = sorted({one.prompt_tokens for one in sustained.bundles})
    told = " or ".join(map(str, prompts))
    return f"rounds of {told} prompt and {sustained.round_tokens} new tokens"


def shown_celsius(celsius: float | None) -> str:
    return "not told" if celsius is None else f"{celsius:.0f} °C"


def _measure(
    bundle: Bundle, workload: Workload, seconds: float, on_progress: Progress
) -> SustainedFigures:
    manifest = bundle.manifest

    def tell(span: Span) -> None:
        on_progress(
            f"{bundle.directory}: {span.seconds:.0f} of {seconds:.0f} s, "
            f"{span.tokens_per_second:.1f} tokens/s, {shown_celsius(span.celsius)}"
        )

    on_progress(str(bundle.directory))
    with open_session(bundle, workload.threads) as session:
        count, spans = sustain(session, manifest.vocab_size, workload, seconds, on_span=tell)
    rates = [span.tokens_per_second for span in spans]
    known = [span.celsius for span in spans if span.celsius is not None]
    return SustainedFigures(
        bundle=str(bundle.directory),
        digest=bundle.digest(),
        model=manifest.model.id,
        recipe=manifest.quantization.recipe,
        target=manifest.target.name,
        prompt_tokens=workload.decode_prompt,
        new_tokens=count,
        first=rates[0],
        last=rates[-1],
        lowest=min(rates),
        hottest_celsius=max(known, default=None),
        spans=spans,
    )
