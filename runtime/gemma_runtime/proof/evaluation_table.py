"""Shows an evaluation: the worst language as the headline, then a table, the worst first."""

from rich.table import Table
from rich.text import Text

from gemma_runtime.proof.language_figures import DivergenceFigures, Evaluation, TextFigures
from gemma_runtime.proof.texts import is_tag

_HEADINGS = ("tokens", "per char", "bits/byte", "perplexity", "ratio", "95 %", "KL", "p99", "top-1")


def render_evaluation(name: str, evaluation: Evaluation) -> list[Table | Text]:
    texts, total = evaluation.texts, evaluation.total
    are_languages = all(is_tag(text.name) for text in texts)
    kind = "language" if are_languages else "text"
    table = Table(box=None)
    table.add_column(kind if are_languages else "")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for figures in (*texts, total):
        table.add_row(Text(figures.name), *_sizes(figures), *_cells(figures.teacher))
    if total.noise is not None:
        table.add_row("noise", *("",) * 4, *_cells(total.noise))
    headline = [Text(_headline(kind, evaluation))] if len(texts) > 1 else []
    return [Text(name), *headline, table, Text(_caption(evaluation))]


def _headline(kind: str, evaluation: Evaluation) -> str:
    worst, first = evaluation.worst, evaluation.texts[0]
    median = f"{worst.times_median:.1f} times the median of {len(evaluation.texts)}"
    if first.teacher is None:
        return f"worst {kind}: {worst.name}, {worst.value:.3f} bits per byte, {median}"
    ratio, kl = first.teacher.ratio, first.teacher.kl
    return (
        f"worst {kind}: {worst.name}, KL {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}], {median}; "
        f"perplexity ×{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
    )


def _caption(evaluation: Evaluation) -> str:
    parts = [evaluation.note]
    if (teacher := evaluation.total.teacher) is not None:
        parts.append(f"its other tokens, counted as one, have {teacher.rest:.1%}")
    if evaluation.exact:
        parts.append("with float activations")
    if evaluation.total.noise is not None:
        parts.append("noise: this bundle fed token by token, and in chunks")
    return "; ".join(parts)


def _sizes(figures: TextFigures) -> tuple[str, ...]:
    return (
        str(figures.positions),
        f"{figures.tokens_per_character:.3f}",
        f"{figures.bits_per_byte:.3f}",
        f"{figures.perplexity:.2f}",
    )


def _cells(figures: DivergenceFigures | None) -> tuple[str, ...]:
    if figures is None:
        return ("",) * 5
    ratio = figures.ratio
    return (
        f"{ratio.value:.3f}",
        f"{ratio.low:.3f}–{ratio.high:.3f}",
        f"{figures.kl.value:.4f}",
        f"{figures.p99_kl:.3f}",
        f"{figures.top1:.1%}",
    )
