"""Shows a comparison of two runs as one table for each task or group."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from gemma_runtime.proof.compare_runs import PairedFigures, RunComparison, ScoreComparison
from gemma_runtime.proof.paired import Difference


def render_runs(comparison: RunComparison, *, all_tasks: bool = False) -> list[Table | Text]:
    """Tables of the groups and of tasks outside them, or of `all_tasks`."""
    scores = comparison.main_scores
    if all_tasks:
        scores = (*comparison.groups, *comparison.tasks)
    notes = [Text(f"a: {comparison.a}\nb: {comparison.b}")]
    for name, lacking in (("a", comparison.only_a), ("b", comparison.only_b)):
        if lacking:
            counts = ", ".join(f"{count} of {task}" for task, count in lacking.items())
            notes.append(Text(f"not compared, because only {name} has them: {counts}"))
    if comparison.unscored:
        names = ", ".join(comparison.unscored)
        notes.append(Text(f"not compared, because they have no score for each question: {names}"))
    shown = [(_title(score), _table(score, comparison.noise)) for score in scores]
    return [*notes, *(part for parts in shown for part in parts)]


def _title(score: ScoreComparison) -> Text:
    """On its own: a table's title is no wider than the table."""
    clusters = score.figures.clusters
    of = "" if clusters is None else f" in {clusters} clusters"
    return Text(f"\n{score.task}: {score.label}, {score.figures.questions} questions{of}")


def _table(score: ScoreComparison, twice: str | None) -> Table:
    figures, noise = score.figures, score.noise
    table = Table(box=None)
    table.add_column("")
    table.add_column("a → b", justify="right")
    if noise is not None:
        table.add_column(Text(f"{twice}, twice"), justify="right")
    columns = [dict(_lines(part)) for part in (figures, noise) if part is not None]
    for label in columns[0]:
        table.add_row(label, *(column.get(label, "") for column in columns))
    return table


def _lines(figures: PairedFigures) -> Iterator[tuple[str, str]]:
    share = figures.are_shares
    yield "score", " → ".join(_number(x, share) for x in (figures.a, figures.b))
    yield "difference [95%]", _interval(figures.difference, share)
    yield "smallest that would show", _smallest(figures, share)
    if figures.flips is not None and figures.flipped is not None:
        yield "lost, won", f"{figures.flips.lost}, {figures.flips.won}"
        yield "flips", f"{figures.flipped:.1%}"
        yield "McNemar p", f"{figures.mcnemar_p:.2g}"
    if figures.answers_changed is not None:
        yield "answers changed", f"{figures.answers_changed:.1%}"
    if figures.log_p_right is not None:
        change, low, high = figures.log_p_right
        yield "log p(right) [95%]", f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
    if figures.choice_kl is not None:
        yield "KL of the choices", f"{figures.choice_kl:.2g}"


def _number(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else f"{value:.4g}"


def _interval(difference: Difference, share: bool) -> str:
    if not share:
        return "{:+.3g} [{:+.3g}, {:+.3g}]".format(*difference)
    return "{:+.1f}% [{:+.1f}, {:+.1f}]".format(*(100 * value for value in difference))


def _smallest(figures: PairedFigures, share: bool) -> str:
    if figures.are_too_few:
        return "none: too few questions"
    return _number(figures.smallest_difference, share)
