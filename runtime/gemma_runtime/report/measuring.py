"""Measures what a page lacks, with the functions behind the other commands."""

import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.inspection import compare_bundles
from gemma_runtime.contents.subject import describe_subject
from gemma_runtime.lm_eval.shared import CHUNK
from gemma_runtime.measure.bench import Benchmark, measure
from gemma_runtime.proof.compare_runs import RunComparison, compare_runs
from gemma_runtime.proof.evaluate import evaluate_bundle
from gemma_runtime.proof.safety import SafetyComparison, compare_safety
from gemma_runtime.proof.safety_prompts import SafetyPrompt, read_prompts
from gemma_runtime.proof.texts import read_segments
from gemma_runtime.proof.verify import verify_bundle
from gemma_runtime.report.collected import Collected, Column, collect
from gemma_runtime.report.figures import Evaluated, Figures, Source, TaskScores, Verified

_OTHER_CHUNK = CHUNK // 2  # to measure the noise of tasks
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What can be measured only with something of the user's."""

    texts: Sequence[Path] = ()  # for eval
    tasks: Sequence[str] = ()
    include: Sequence[Path] = ()
    limit: int | None = None
    prompts: Path | None = None
    harmless: Path | None = None
    replies: int = 0  # tokens of a reply to each prompt
    repeats: int = 5
    threads: int | None = None

    def are_given(self) -> bool:
        questions = (self.tasks, self.include, self.limit)
        return any((self.texts, *questions, self.prompts, self.harmless, self.replies))


def measure_missing(collected: Collected, inputs: Inputs, on_progress: Progress) -> Collected:
    """Add figures of the kinds that no file had. Raises what the commands raise."""
    steps = (_verify, _evaluate, _inspect, _bench, _tasks, _safety)
    measured = [source for step in steps for source in step(collected, inputs, on_progress)]
    return collect([column.bundle for column in collected.columns], [*collected.sources, *measured])


def _source(kind: str, figures: Figures) -> Source:
    return Source("measured for this page", kind, figures)


def _verify(collected: Collected, inputs: Inputs, on_progress: Progress) -> Iterator[Source]:
    for column in _without(collected, collected.verified()):
        on_progress(f"verify {column.bundle.directory}")
        verification = verify_bundle(column.bundle, inputs.threads)
        yield _source("verify", Verified(describe_subject(column.bundle), verification))


def _evaluate(collected: Collected, inputs: Inputs, on_progress: Progress) -> Iterator[Source]:
    """Bundles with a teacher bring a text of their own."""
    texts = read_segments(*inputs.texts) if inputs.texts else None
    for column in _without(collected, collected.evaluated()):
        if texts is not None or "teacher" in column.bundle.manifest.roles:
            on_progress(f"eval {column.bundle.directory}")
            evaluation = evaluate_bundle(column.bundle, texts, inputs.threads, noise=True)
            yield _source("eval", Evaluated(describe_subject(column.bundle), evaluation))


def _inspect(collected: Collected, inputs: Inputs, on_progress: Progress) -> Iterator[Source]:
    bundles = [column.bundle for column in _without(collected, collected.held_codes())]
    if bundles:
        on_progress(f"inspect {', '.join(str(bundle.directory) for bundle in bundles)}")
        yield _source("inspect", compare_bundles(bundles, read_codes=True))


def _bench(collected: Collected, inputs: Inputs, on_progress: Progress) -> Iterator[Source]:
    """All bundles in turns, even if only one is missing: only then can they be compared."""
    known = {one.digest for found in collected.all_of(Benchmark) for one in found.bundles}
    if any(column.digest not in known for column in collected.columns):
        folders = [column.bundle.directory for column in collected.columns]
        benchmark = measure(
            folders,
            threads=inputs.threads,
            repeats=inputs.repeats,
            on_progress=lambda text: on_progress(f"bench {text}"),
        )
        yield _source("bench", benchmark)


def _tasks(collected: Collected, inputs: Inputs, on_progress: Progress) -> Iterator[Source]:
    """Scores of each bundle; the first compared with each other one, with that one's noise."""
    if not inputs.tasks or _has(collected, RunComparison, TaskScores):
        return
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        yield _run(collected.columns[0], inputs, first, CHUNK, on_progress)
        for column in collected.columns[1:]:
            run, again = (Path(scratch) / f"{column.index}-{n}" for n in (CHUNK, _OTHER_CHUNK))
            yield _run(column, inputs, run, CHUNK, on_progress)
            _run(column, inputs, again, _OTHER_CHUNK, on_progress)
            yield _source("compare", compare_runs(first, run, again))


def _run(column: Column, inputs: Inputs, output: Path, chunk: int, on_progress: Progress) -> Source:
    from gemma_runtime.lm_eval.run import ModelOptions, TaskOptions, run_tasks

    on_progress(f"lm-eval {column.bundle.directory}, chunks of {chunk}")
    options = TaskOptions(tasks=inputs.tasks, include=inputs.include, limit=inputs.limit)
    model = ModelOptions(threads=inputs.threads, chunk=chunk)
    results = run_tasks(column.bundle.directory, options, model, output)
    return _source("lm-eval", msgspec.convert(results, TaskScores))


def _safety(collected: Collected, inputs: Inputs, on_progress: Progress) -> Iterator[Source]:
    prompts = [*_prompts(inputs.prompts, False), *_prompts(inputs.harmless, True)]
    if not prompts or _has(collected, SafetyComparison):
        return
    first, *rest = (column.bundle for column in collected.columns)
    others: list[Bundle | None] = [*rest]
    for other in others or [None]:
        on_progress(f"safety {first.directory}" + (f" {other.directory}" if other else ""))
        comparison = compare_safety(
            first, other, prompts, replies=inputs.replies, threads=inputs.threads
        )
        yield _source("safety", comparison)


def _prompts(path: Path | None, harmless: bool) -> Sequence[SafetyPrompt]:
    return [] if path is None else read_prompts(path, harmless)


def _has(collected: Collected, *kinds: type[object]) -> bool:
    return any(isinstance(source.figures, kinds) for source in collected.sources)


def _without(collected: Collected, known: Container[str]) -> list[Column]:
    return [column for column in collected.columns if column.digest not in known]
