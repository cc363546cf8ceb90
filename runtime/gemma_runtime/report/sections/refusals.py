"""How two bundles react to the same harmful and harmless prompts."""

from collections.abc import Iterator

from gemma_runtime.proof.safety import FEW, KindFigures, SafetyComparison
from gemma_runtime.report.chart import Chart, Form, Panel, Row, Value, draw
from gemma_runtime.report.collected import Collected
from gemma_runtime.report.parts import Part, Section, Table, TableRow, Warning, missing
from gemma_runtime.report.scale import linear
from gemma_runtime.report.wording import ABSENT, interval, nats, number

_LEAD = (
    "Change of the log-odds of refusing against complying openings, in nats, on the same prompts, "
    "with a 95 % paired bootstrap interval. On harmful prompts below 0 means less refusing; on "
    "harmless ones above 0 means more. Refusals are told by English key words: a lower bound, "
    "whose change is comparable. Prompts and replies are not on this page."
)
_HEAD = ("", "n", "log-odds a", "log-odds b", "change [95 %]", "smallest to show", "signs changed")
_MORE = ("KL, mean (largest)", "refusals a → b", "lost, new", "McNemar p")


def safety(collected: Collected) -> Section:
    comparisons = collected.all_of(SafetyComparison)
    if not comparisons:
        command = "gemma-runtime safety BUNDLE_A BUNDLE_B --prompts FILE --json > safety.json"
        return missing("safety", "Safety", command)
    parts: list[Part] = [_chart(collected, comparisons)]
    for comparison in comparisons:
        name = " → ".join(_names(collected, comparison))
        rows = tuple(TableRow(kind, _cells(figures)) for kind, figures in _kinds(comparison))
        parts.append(Table((*_HEAD, *_MORE), rows, name, comparison.note))
        few = [kind for kind, figures in _kinds(comparison) if figures.prompts < FEW]
        if few:
            parts.append(
                Warning(
                    f"{name}: fewer than {FEW} {' and '.join(few)} prompts, so the interval is "
                    "narrower than it should be"
                )
            )
    return Section("safety", "Safety", _LEAD, tuple(parts))


def _names(collected: Collected, comparison: SafetyComparison) -> tuple[str, str]:
    return (
        collected.name(comparison.digest_a, comparison.a),
        collected.name(comparison.digest_b, comparison.b),
    )


def _kinds(comparison: SafetyComparison) -> Iterator[tuple[str, KindFigures]]:
    if comparison.harmful is not None:
        yield "harmful", comparison.harmful
    if comparison.harmless is not None:
        yield "harmless", comparison.harmless


def _chart(collected: Collected, comparisons: list[SafetyComparison]) -> Chart:
    named = [(*_names(collected, comparison), comparison) for comparison in comparisons]
    rows = [
        Row(f"{kind}, {b}", ((_dot(f"{kind}, {a} → {b}", figures),),))
        for a, b, comparison in named
        for kind, figures in _kinds(comparison)
    ]
    ends = [x for row in rows for v in row.cells[0] for x in (v.value, v.low or 0, v.high or 0)]
    title = "change of the log-odds of refusing, nats"
    panel = Panel(title, Form.DOTS, linear(ends), lambda x: number(x, ".2g"))
    return draw("Change of the log-odds of refusing", [panel], rows)


def _dot(name: str, figures: KindFigures) -> Value:
    change = figures.change
    tip = f"{name}: {interval(change)} over {figures.prompts} prompts"
    return Value(change.difference, tip, "plain", change.low, change.high)


def _cells(figures: KindFigures) -> tuple[str, ...]:
    refusals = figures.refusals
    return (
        str(figures.prompts),
        number(figures.log_odds_a, ".2f"),
        number(figures.log_odds_b, ".2f"),
        interval(figures.change),
        number(figures.smallest_change, ".3f"),
        str(figures.sign_changes),
        f"{nats(figures.mean_kl)} ({nats(figures.max_kl)})",
        ABSENT if refusals is None else f"{refusals.a} → {refusals.b}",
        ABSENT if refusals is None else f"{refusals.lost}, {refusals.new}",
        ABSENT if refusals is None else number(refusals.mcnemar_p, ".2g"),
    )
