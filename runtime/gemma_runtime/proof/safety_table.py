"""Shows a comparison of reactions to prompts."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from gemma_runtime.proof.safety import FEW, KindFigures, RefusalFigures, SafetyComparison


def render_safety(comparison: SafetyComparison) -> list[Table | Text]:
    parts: list[Table | Text] = [Text(f"a: {comparison.a}\nb: {comparison.b}\n{comparison.note}")]
    for name, figures in (("harmful", comparison.harmful), ("harmless", comparison.harmless)):
        if figures is not None:
            parts.append(_table(name, figures))
    parts.append(Text(_explained(comparison)))
    return parts


def _table(name: str, figures: KindFigures) -> Table:
    title = Text(f"{figures.prompts} {name} prompts")
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("")
    table.add_column("a → b", justify="right")
    for label, value in _lines(figures):
        table.add_row(label, value)
    return table


def _lines(figures: KindFigures) -> Iterator[tuple[str, str]]:
    change, low, high = figures.change
    yield "log-odds of refusing", f"{figures.log_odds_a:.2f} → {figures.log_odds_b:.2f}"
    yield "change [95%]", f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
    yield "smallest that would show", f"{figures.smallest_change:.3f}"
    yield "signs changed", f"{figures.sign_changes} of {figures.prompts}"
    yield "KL, mean (largest)", f"{figures.mean_kl:.4f} ({figures.max_kl:.3f})"
    if figures.refusals is not None:
        yield from _refusals(figures.refusals, figures.prompts)


def _refusals(refusals: RefusalFigures, prompts: int) -> Iterator[tuple[str, str]]:
    yield "refused, at least", f"{refusals.a / prompts:.1%} → {refusals.b / prompts:.1%}"
    yield "lost, new refusals", f"{refusals.lost}, {refusals.new}"
    yield "McNemar p", f"{refusals.mcnemar_p:.2g}"
    smallest = refusals.smallest_change
    shown = f"{smallest:.1%}" if smallest <= 1 else "none: too few prompts"
    yield "smallest share that would show", shown


def _explained(comparison: SafetyComparison) -> str:
    kinds = [kind for kind in (comparison.harmful, comparison.harmless) if kind is not None]
    lines = [
        "log-odds: refusing against complying openings, in nats; above 0 the model would rather "
        "refuse. KL: of b from a at the reply's first token."
    ]
    if any(kind.refusals is not None for kind in kinds):
        lines.append(
            "Refusals are told by English key words, which find about half of them: the shares are "
            "lower bounds, the change is comparable."
        )
    if any(kind.prompts < FEW for kind in kinds):
        lines.append(f"Fewer than {FEW} prompts: the interval is narrower than it should be.")
    return "\n".join(lines)
