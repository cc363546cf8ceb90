"""Tasks: each bundle's scores, and how paired answers differ."""

from collections.abc import Iterator
from typing import NamedTuple

from gemma_runtime.proof.compare_runs import (
    PairedFigures,
    RunComparison,
    ScoreComparison,
    metric_label,
)
from gemma_runtime.report.chart import Chart, Form, Panel, Row, Value, draw
from gemma_runtime.report.collected import Collected
from gemma_runtime.report.figures import TaskScores
from gemma_runtime.report.parts import Key, Legend, Part, Section, Table, TableRow, missing
from gemma_runtime.report.scale import linear
from gemma_runtime.report.wording import ABSENT, interval, number, percent

_LEAD = (
    "The same questions, answered by two models. Equal scores hide answers that change in both "
    "directions, so the bars count answers lost (left) and won (right); the dots show how the "
    "log-probability of the right choice changed. Intervals are 95 %, by a paired bootstrap. "
    "Noise: one bundle twice, in other chunks."
)
_HEAD = ("", "n", "score a", "score b", "difference [95 %]", "smallest to show", "lost, won")
_MORE = ("McNemar p", "answers changed", "log p(right) [95 %]")


class _Line(NamedTuple):
    """One comparison of one metric."""

    label: str
    figures: PairedFigures
    is_noise: bool


def tasks(collected: Collected) -> Section:
    comparisons = collected.all_of(RunComparison)
    scores = collected.scores()
    if not comparisons and not scores:
        command = "gemma-runtime compare RUN_A RUN_B --json > compare.json"
        return missing("tasks", "Tasks", f"{command}   (runs: gemma-runtime lm-eval)")
    parts: list[Part] = []
    for comparison in comparisons:
        parts += _comparison(collected, comparison)
    for column in collected.columns:
        runs = scores.get(column.digest, [])
        parts += [_scores(column.label, run) for run in runs]
    return Section("tasks", "Tasks", _LEAD if comparisons else "", tuple(parts))


def _comparison(collected: Collected, comparison: RunComparison) -> list[Part]:
    a = collected.name(comparison.artifact_a, comparison.a)
    b = collected.name(comparison.artifact_b, comparison.b)
    lines = [line for score in comparison.main_scores for line in _lines(score)]
    flips = [line for line in lines if line.figures.flips is not None]
    table = Table(
        (*_HEAD, *_MORE),
        tuple(TableRow(line.label, _cells(line.figures), line.is_noise) for line in lines),
        f"{a} → {b}",
        _note(comparison),
    )
    keys = (Key("answers lost", "lost", 1), Key("answers won", "won", 1))
    legend = [Legend(keys)] if flips else []
    charts = [_chart(f"{a} → {b}", flips)] if flips else []
    return [*legend, *charts, table]


def _lines(score: ScoreComparison) -> Iterator[_Line]:
    yield _Line(f"{score.task}: {score.label}", score.figures, False)
    if score.noise is not None:
        yield _Line("noise", score.noise, True)


def _chart(name: str, lines: list[_Line]) -> Chart:
    rows = [
        Row(
            line.label,
            (_bars(line), _change(line)),
            quiet=line.is_noise,
        )
        for line in lines
    ]
    shares = [value.value for row in rows for value in row.cells[0]]
    changes = [
        end
        for row in rows
        for value in row.cells[1]
        for end in (value.low or 0.0, value.value, value.high or 0.0)
    ]
    panels = [
        Panel(
            "answers lost ← 0 → won, share of n",
            Form.BARS,
            linear([*shares, *(-share for share in shares)]),
            lambda x: percent(abs(x), ".3g"),
            1.5,
        )
    ]
    if changes:
        title = "change of log p(right), nats"
        panels.append(Panel(title, Form.DOTS, linear(changes), lambda x: number(x, ".2g")))
    else:
        rows = [Row(row.label, row.cells[:1], row.quiet) for row in rows]
    return draw(f"Answers lost and won, {name}", panels, rows)


def _bars(line: _Line) -> tuple[Value, ...]:
    figures = line.figures
    if figures.flips is None or figures.questions <= 0:
        return ()
    lost, won = figures.flips
    tip = f"{line.label}: {lost} lost, {won} won of {figures.questions}"
    faint = " faint" if line.is_noise else ""
    return (
        Value(-lost / figures.questions, tip, f"lost{faint}"),
        Value(won / figures.questions, tip, f"won{faint}"),
    )


def _change(line: _Line) -> tuple[Value, ...]:
    change = line.figures.log_p_right
    if change is None:
        return ()
    tip = f"{line.label}: {interval(change)} nats"
    return (Value(change.difference, tip, "plain", change.low, change.high),)


def _cells(figures: PairedFigures) -> tuple[str, ...]:
    share = figures.are_shares
    flips = figures.flips
    of = "" if figures.clusters is None else f" ({figures.clusters} clusters)"
    return (
        f"{figures.questions}{of}",
        _score(figures.a, share),
        _score(figures.b, share),
        interval(figures.difference, share),
        _smallest(figures, share),
        ABSENT if flips is None else f"{flips.lost}, {flips.won}",
        number(figures.mcnemar_p, ".2g"),
        percent(figures.answers_changed),
        ABSENT if figures.log_p_right is None else interval(figures.log_p_right),
    )


def _smallest(figures: PairedFigures, share: bool) -> str:
    if figures.are_too_few:
        return "none: n too small"
    return _score(figures.smallest_difference, share)


def _score(value: float, share: bool) -> str:
    return percent(value) if share else number(value)


def _note(comparison: RunComparison) -> str:
    notes = ["a is the first model, b the second"]
    lacking = sum(comparison.only_a.values()) + sum(comparison.only_b.values())
    if lacking:
        notes.append(f"{lacking} questions that only one run has are left out")
    if comparison.noise is None:
        notes.append("no noise floor: give compare a --noise run")
    return "; ".join(notes) + "."


def _scores(label: str, run: TaskScores) -> Table:
    rows = tuple(
        TableRow(task, (metric, n, value, error))
        for task, results in run.results.items()
        for metric, n, value, error in _results(task, results, run)
    )
    title = f"{label}: scores of one run"
    note = "Error: lm_eval's standard error of one mean. To tell two models apart, use compare."
    return Table(("", "metric", "n", "score", "± error"), rows, title, note)


def _results(
    task: str, results: dict[str, object], run: TaskScores
) -> Iterator[tuple[str, str, str, str]]:
    n = run.questions.get(task, {}).get("effective")
    for name, value in results.items():
        metric, _, filter = name.partition(",")
        if isinstance(value, int | float) and filter and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{filter}")
            shown = number(error) if isinstance(error, int | float) else ABSENT
            yield (
                metric_label(metric, filter),
                ABSENT if n is None else str(n),
                number(value),
                shown,
            )
