"""What quantization costs each language."""

from collections.abc import Callable

from gemma_runtime.proof.language_figures import (
    DivergenceFigures,
    Estimate,
    Evaluation,
    TextFigures,
)
from gemma_runtime.report.chart import Chart, Form, Panel, Row, Value, draw
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.legend import bundles_legend
from gemma_runtime.report.parts import Part, Section, Table, TableRow, Warning, missing
from gemma_runtime.report.scale import SHARE, decades, linear
from gemma_runtime.report.wording import ABSENT, nats, number, percent

_Known = list[tuple[Column, Evaluation]]
_LEAD = (
    "Worst first. KL of the next token from the float32 model's, with a 95 % interval by bootstrap "
    "over blocks of 8 positions; how often the likeliest token is the same; and tokens per "
    "character, which is what a text costs in time. Noise: the same bundle, fed token by token."
)
_HEAD = (
    *("", "n", "KL [95 %]", "median", "p99", "top-1", "perplexity", "ratio [95 %]"),
    *("bits/byte", "tok/char"),
)
_NO_NOISE = "No noise floor: measure with gemma-runtime eval --noise."


def languages(collected: Collected) -> Section:
    found = collected.evaluated()
    known = [(c, found[c.digest].evaluation) for c in collected.columns if c.digest in found]
    if not known:
        command = "gemma-runtime eval BUNDLE --text FOLDER --noise --json > eval.json"
        return missing("languages", "Languages", command)
    parts: list[Part] = [*bundles_legend([column for column, _ in known])]
    parts += [_chart(known)] if _has_teacher(known) else []
    parts += [_table(column, evaluation) for column, evaluation in known]
    if not any(evaluation.total.noise for _, evaluation in known):
        parts.append(Warning(_NO_NOISE))
    return Section("languages", "Languages", _LEAD, tuple(parts))


def _has_teacher(known: _Known) -> bool:
    return any(text.teacher for _, evaluation in known for text in evaluation.texts)


def _chart(known: _Known) -> Chart:
    names = _worst_first(known)
    rows = [_row(name, [(c, _find(e, name)) for c, e in known]) for name in names]
    if any(evaluation.total.noise for _, evaluation in known):
        rows.append(_noise_row(known))
    values = [
        end
        for row in rows
        for value in row.cells[0]
        for end in (value.value, value.low or value.value, value.high or value.value)
    ]
    costs = [value.value for row in rows for value in row.cells[2]]
    panels = [
        Panel("mean KL to float32, nats", Form.DOTS, decades(values), lambda x: number(x, "g"), 3),
        Panel("same top token", Form.DOTS, SHARE, lambda x: percent(x, ".0f"), 1.6),
        Panel("tokens per character", Form.BARS, linear(costs), lambda x: number(x, "g"), 1.2),
    ]
    return draw("KL, top-1 and tokens per character of each language", panels, rows)


def _worst_first(known: _Known) -> list[str]:
    """By the largest KL that any bundle has."""
    worst: dict[str, float] = {}
    for _, evaluation in known:
        for text in evaluation.texts:
            kl = 0.0 if text.teacher is None else text.teacher.kl.value
            worst[text.name] = max(worst.get(text.name, 0.0), kl if kl == kl else float("inf"))
    return sorted(worst, key=lambda name: worst[name], reverse=True)


def _find(evaluation: Evaluation, name: str) -> TextFigures | None:
    return next((text for text in evaluation.texts if text.name == name), None)


def _row(name: str, found: list[tuple[Column, TextFigures | None]]) -> Row:
    kls, tops = [], []
    for stripe, (column, text) in enumerate(found):
        if text is not None and text.teacher is not None:
            values = _dots(name, column, text.teacher, stripe)
            kls.append(values[0])
            tops.append(values[1])
    cost = next((text for _, text in found if text is not None), None)
    bars = () if cost is None else (_cost(name, cost, len(found)),)
    return Row(name, (tuple(kls), tuple(tops), bars))


def _dots(
    name: str, column: Column, figures: DivergenceFigures, stripe: int
) -> tuple[Value, Value]:
    kl, ratio = figures.kl, figures.ratio
    what = f"{name}, {column.label}"
    return (
        Value(
            kl.value,
            f"{what}: KL {nats(kl.value)} [{nats(kl.low)}, {nats(kl.high)}], perplexity "
            f"×{number(ratio.value, '.3f')}",
            column.style,
            kl.low,
            kl.high,
            stripe,
            column.shape,
        ),
        Value(
            figures.top1,
            f"{what}: {percent(figures.top1)} of the top tokens are the same",
            column.style,
            stripe=stripe,
            shape=column.shape,
        ),
    )


def _cost(name: str, text: TextFigures, stripes: int) -> Value:
    tip = f"{name}: {number(text.tokens_per_character, '.3f')} tokens per character"
    return Value(text.tokens_per_character, tip, "plain", stripe=(stripes - 1) // 2)


def _noise_row(known: _Known) -> Row:
    kls, tops = [], []
    for stripe, (column, evaluation) in enumerate(known):
        if evaluation.total.noise is not None:
            values = _dots("noise, all texts", column, evaluation.total.noise, stripe)
            kls.append(values[0])
            tops.append(values[1])
    return Row("noise", (tuple(kls), tuple(tops), ()), quiet=True)


def _table(column: Column, evaluation: Evaluation) -> Table:
    texts = [*evaluation.texts, evaluation.total]
    rows = [TableRow(text.name, _cells(text, text.teacher)) for text in texts]
    rows += [
        TableRow(f"noise, {text.name}", _cells(text, text.noise), quiet=True)
        for text in [evaluation.total]
        if text.noise is not None
    ]
    exact = " (float activations)" if evaluation.exact else ""
    note = f"n: tokens; {evaluation.note}."
    return Table(_HEAD, tuple(rows), f"{column.label}{exact}", note)


def _cells(text: TextFigures, figures: DivergenceFigures | None) -> tuple[str, ...]:
    ratio = "" if figures is None else _estimate(figures.ratio, lambda x: number(x, ".3f"))
    return (
        str(text.positions),
        ABSENT if figures is None else _estimate(figures.kl, nats),
        ABSENT if figures is None else nats(figures.median_kl),
        ABSENT if figures is None else nats(figures.p99_kl),
        ABSENT if figures is None else percent(figures.top1),
        number(text.perplexity, ".2f"),
        ratio or ABSENT,
        number(text.bits_per_byte, ".3f"),
        number(text.tokens_per_character, ".3f"),
    )


def _estimate(estimate: Estimate, written: Callable[[float], str]) -> str:
    return f"{written(estimate.value)} [{written(estimate.low)}, {written(estimate.high)}]"
