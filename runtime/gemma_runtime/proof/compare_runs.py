"""Compares two runs of lm_eval on the questions that both have.

Accuracy alone can't tell a harmless change from one that loses as many answers as it wins, so the
figures are also about which answers changed, and about their probabilities.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_runtime.errors import EvaluationError
from gemma_runtime.proof.paired import (
    Difference,
    Flips,
    choice_kl,
    count_flips,
    log_choices,
    mcnemar,
    paired_difference,
    smallest_difference,
)
from gemma_runtime.proof.task_runs import Answer, TaskRun, open_task_run

Pair = tuple[Answer, Answer]


@dataclass(frozen=True, slots=True)
class PairedFigures:
    """How b's answers to the same questions differ from a's. Intervals are 95 %.

    What needs scores of 0 and 1, or answers to choose from, is None for other questions.
    """

    questions: int
    clusters: int | None  # subjects or tasks; None if each question is its own
    a: float  # mean score
    b: float
    difference: Difference  # b - a
    flips: Flips | None
    flipped: float | None  # share of questions
    mcnemar_p: float | None
    answers_changed: float | None  # share of questions, also those wrong on both sides
    log_p_right: Difference | None  # change of log p(right choice), in nats
    choice_kl: float | None  # mean KL(a ‖ b) over the choices, in nats
    smallest_difference: float

    @property
    def are_shares(self) -> bool:
        """Whether the scores lie between 0 and 1, so that they can be written in per cent."""
        return max(abs(self.a), abs(self.b)) <= 1

    @property
    def are_too_few(self) -> bool:
        """Whether not even a change of every answer would show."""
        return self.flips is not None and self.smallest_difference > 1


@dataclass(frozen=True, slots=True)
class ScoreComparison:
    """One metric of a task, or of all tasks of a group."""

    task: str
    filter: str
    metric: str
    figures: PairedFigures
    noise: PairedFigures | None  # the same artifact twice, in other chunks

    @property
    def label(self) -> str:
        """`metric_label`."""
        return metric_label(self.metric, self.filter)


@dataclass(frozen=True, slots=True)
class RunComparison:
    a: str
    b: str
    artifact_a: str  # a bundle's digest; the model's name for other models
    artifact_b: str
    noise: str | None  # the artifact that was run twice
    groups: tuple[ScoreComparison, ...]
    tasks: tuple[ScoreComparison, ...]
    grouped: tuple[str, ...]  # tasks that one of the groups has
    unscored: tuple[str, ...]  # tasks without a number for each question, such as perplexities
    only_a: Mapping[str, int]  # questions, by task, that the other run lacks
    only_b: Mapping[str, int]

    @property
    def main_scores(self) -> tuple[ScoreComparison, ...]:
        """Those of groups, and of tasks outside them."""
        apart = (task for task in self.tasks if task.task not in self.grouped)
        return (*self.groups, *apart)


def metric_label(metric: str, filter: str) -> str:
    """A metric with the filter that read the answers, if it is not the plain one."""
    return metric if filter == "none" else f"{metric}, {filter}"


def compare_runs(a: Path, b: Path, noise: Path | None = None) -> RunComparison:
    """Compare runs in folders of lm_eval's results.

    `noise` is one more run of a's or b's artifact, whose figures show what a difference has to
    exceed. Raises EvaluationError if the runs have no question in common, if a question's prompt is
    not the same, or if `noise` is of another artifact.
    """
    before, after = open_task_run(a), open_task_run(b)
    shared = [task for task in before.tasks if task in after.tasks]
    pairs = _shared_pairs(shared, before, after)
    again = None if noise is None else open_task_run(noise)
    twin = None if again is None else _twin(again, before, after)
    same = {} if again is None or twin is None else _shared_pairs(shared, twin, again)
    tasks = {task: tuple(_compare(task, (task,), pairs, same)) for task in shared}
    if not any(tasks.values()):
        raise EvaluationError(f"{', '.join(shared)} has no score for each question; use eval")
    groups = {
        name: tuple(_compare(name, members, pairs, same))
        for name, members in before.groups.items()
        if set(members) <= set(shared)
    }
    return RunComparison(
        a=before.model,
        b=after.model,
        artifact_a=before.artifact,
        artifact_b=after.artifact,
        noise=None if twin is None else twin.model,
        groups=tuple(score for scores in groups.values() for score in scores),
        tasks=tuple(score for scores in tasks.values() for score in scores),
        grouped=tuple(
            sorted({task for name in groups if groups[name] for task in before.groups[name]})
        ),
        unscored=tuple(task for task in shared if pairs[task] and not tasks[task]),
        only_a=_lacking(before, pairs),
        only_b=_lacking(after, pairs),
    )


def _twin(again: TaskRun, before: TaskRun, after: TaskRun) -> TaskRun:
    """The run of the same artifact."""
    twin = next((run for run in (after, before) if run.artifact == again.artifact), None)
    if twin is None:
        raise EvaluationError(
            f"--noise is a run of {again.model}, expected one more of {after.model} or of "
            f"{before.model}"
        )
    return twin


def _shared_pairs(tasks: Sequence[str], a: TaskRun, b: TaskRun) -> dict[str, list[Pair]]:
    pairs = {task: _pairs(task, a, b) for task in tasks if task in b.tasks}
    if not any(pairs.values()):
        raise EvaluationError(
            f"{a.path} and {b.path} have no question in common: {', '.join(a.tasks)} against "
            f"{', '.join(b.tasks)}"
        )
    return pairs


def _pairs(task: str, a: TaskRun, b: TaskRun) -> list[Pair]:
    others = {answer.key: answer for answer in b.tasks[task]}
    pairs = [(answer, others[answer.key]) for answer in a.tasks[task] if answer.key in others]
    for one, other in pairs:
        if one.prompt != other.prompt:
            raise EvaluationError(
                f"{task}: the runs asked the same question with different prompts; run both with "
                "the same task files, --num-fewshot, --apply-chat-template and seed"
            )
    return pairs


def _lacking(run: TaskRun, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, int]:
    counts = {task: len(answers) - len(pairs.get(task, ())) for task, answers in run.tasks.items()}
    return {task: count for task, count in counts.items() if count}


def _compare(
    name: str,
    tasks: Sequence[str],
    pairs: Mapping[str, Sequence[Pair]],
    noise_pairs: Mapping[str, Sequence[Pair]],
) -> Iterator[ScoreComparison]:
    """Every metric of every filter that all tasks have."""
    found = [
        {(pair[0].key[0], metric) for pair in pairs[task] for metric in pair[0].scores}
        for task in tasks
    ]
    first = {pair[0].key[0]: next(iter(pair[0].scores), "") for pair in pairs[tasks[0]]}
    for filter, metric in sorted(set.intersection(*found)):
        main = metric == first[filter]
        figures = _figures(tasks, pairs, filter, metric, main)
        if figures is not None:
            noise = _figures(tasks, noise_pairs, filter, metric, main)
            yield ScoreComparison(name, filter, metric, figures, noise)


def _figures(
    tasks: Sequence[str],
    pairs: Mapping[str, Sequence[Pair]],
    filter: str,
    metric: str,
    main: bool,
) -> PairedFigures | None:
    """Figures about answers, not scores, belong to the task's main metric only."""
    named = [
        (task, pair)
        for task in tasks
        for pair in pairs.get(task, ())
        if pair[0].key[0] == filter and all(metric in answer.scores for answer in pair)
    ]
    if not named:
        return None
    chosen = [pair for _, pair in named]
    clusters = _clusters(named)
    a, b = ([answer.scores[metric] for answer in side] for side in zip(*chosen, strict=True))
    flips = count_flips(a, b) if {*a, *b} <= {0.0, 1.0} else None
    return PairedFigures(
        questions=len(chosen),
        clusters=None if clusters is None else len(set(clusters)),
        a=float(np.mean(a)),
        b=float(np.mean(b)),
        difference=paired_difference(a, b, clusters),
        flips=flips,
        flipped=None if flips is None else sum(flips) / len(chosen),
        mcnemar_p=None if flips is None else mcnemar(*flips),
        answers_changed=_answers_changed(chosen) if main else None,
        log_p_right=_log_p_right(chosen, clusters) if main else None,
        choice_kl=_mean_kl(chosen) if main else None,
        smallest_difference=smallest_difference(a, b, clusters),
    )


def _clusters(named: Sequence[tuple[str, Pair]]) -> list[str] | None:
    """What each question belongs to; None if that is nothing, or the same for all."""
    names = [
        task if pair[0].subject is None else f"{task} {pair[0].subject}" for task, pair in named
    ]
    return names if len(set(names)) > 1 else None


def _answers_changed(pairs: Sequence[Pair]) -> float | None:
    if any(_has_one_choice(pair) for pair in pairs):
        return None
    return float(np.mean([_answer(a) != _answer(b) for a, b in pairs]))


def _answer(answer: Answer) -> int | str:
    return answer.text if answer.choices is None else int(answer.choices.argmax())


def _has_one_choice(pair: Pair) -> bool:
    return any(answer.choices is not None and len(answer.choices) == 1 for answer in pair)


def _log_p_right(pairs: Sequence[Pair], clusters: Sequence[str] | None) -> Difference | None:
    """Of a single choice, as in lambada, its own log-likelihood counts."""
    a, b = ([_log_p(answer) for answer in side] for side in zip(*pairs, strict=True))
    known = [x for x in a if x is not None], [x for x in b if x is not None]
    if any(len(values) < len(pairs) for values in known):
        return None
    return paired_difference(*known, clusters)


def _log_p(answer: Answer) -> float | None:
    if answer.choices is None or answer.right is None:
        return None
    one = len(answer.choices) == 1
    return float((answer.choices if one else log_choices(answer.choices))[answer.right])


def _mean_kl(pairs: Sequence[Pair]) -> float | None:
    found = [
        choice_kl(a.choices, b.choices)
        for a, b in pairs
        if a.choices is not None and b.choices is not None and len(a.choices) == len(b.choices) > 1
    ]
    return float(np.mean(found)) if len(found) == len(pairs) else None
