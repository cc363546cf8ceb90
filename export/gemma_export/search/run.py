"""Runs a search: plans the cells, has their work done, and judges what came of it."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from gemma_export.search.estimate import Planned, check_memory, plan_cells
from gemma_export.search.figures import read_figures
from gemma_export.search.job import Failure, Job, forget, read_done, run_job, unfinished
from gemma_export.search.judge import Result, State, judge, result_of
from gemma_export.search.measures import Stage
from gemma_export.search.processes import Processes
from gemma_export.search.question import Question
from gemma_export.search.schedule import Outcome, Scheduler, open_scheduler, outcome_of
from gemma_export.search.schema import listed
from gemma_export.search.steps import Jobs, export_flags
from gemma_runtime.errors import GemmaError, SearchError
from gemma_runtime.machine import Machine, describe_machine

_IDLE = 0.25  # share of the processor that others may use while speed is measured


@dataclass(frozen=True, slots=True)
class Search:
    """A search's question and answer."""

    file: str
    machine: Machine
    objectives: tuple[str, ...]
    limits: Mapping[str, float]
    text_digest: str | None
    cells: tuple[Result, ...]
    take: str | None  # the cell to take
    why: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class How:
    """How the work is done."""

    workers: int = 1
    ray: str | None = None
    resume: bool = True


Told = Callable[[str], None]
Advanced = Callable[[Result, int, int], None]  # a finished cell, its number, and how many there are


def plan_search(question: Question) -> Search:
    """What a search would do, without any work."""
    planned = plan_cells(question)
    results = [_planned(one) for one in planned]
    possible = sum(one.state is State.PLANNED for one in results)
    why = f"{possible} of {len(results)} cells can be worth the work"
    return _search(question, results, None, why)


def run_search(
    question: Question, folder: Path, how: How, tell: Told, advanced: Advanced
) -> Search:
    """Do what is not done yet, and judge all cells. Raises SearchError if all are ruled out."""
    planned = plan_cells(question)
    if not any(one.ruled_out is None for one in planned):
        reason = planned[0].ruled_out if planned else "its targets can hold no recipe"
        raise SearchError(f"{question.path}: all {len(planned)} cells are ruled out; {reason}")
    if how.ray is None and (reason := check_memory(planned, how.workers)):
        raise SearchError(reason)
    with _owned(folder) as token:
        return _Run(question, folder.absolute(), how, token, tell, advanced).search(planned)


@contextmanager
def _owned(folder: Path) -> Iterator[str]:
    """Hold the folder for this search. Yields the name of a file in it."""
    name = ".search.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SearchError(
            f"another search runs in {folder}; wait, or give another --output"
        ) from error
    except OSError as error:
        raise SearchError(f"can't write into {folder}: {error.strerror or error}") from error
    try:
        yield name
    finally:
        lock.release()


class _Run:
    """One run of a search."""

    def __init__(
        self,
        question: Question,
        folder: Path,
        how: How,
        token: str,
        tell: Told,
        advanced: Advanced,
    ) -> None:
        self._question, self._how, self._tell, self._advanced = question, how, tell, advanced
        self._jobs = Jobs(question, folder, token if how.ray else None)
        self._results: dict[str, Result] = {}
        self._planned: dict[str, Planned] = {}

    def search(self, planned: Sequence[Planned]) -> Search:
        self._planned = {one.cell.name: one for one in planned}
        jobs = []
        for one in planned:
            self._results[one.cell.name] = _planned(one)
            if one.ruled_out is None and (job := self._open(one)) is not None:
                jobs.append(job)
        left = [job for job in jobs if not self._take_over(job)]
        if left:
            with open_scheduler(self._how.workers, self._how.ray) as scheduler:
                self._work(left, scheduler)
        results, why = judge(list(self._results.values()), self._question)
        taken = next((one.name for one in results if one.state is State.TAKE), None)
        return _search(self._question, results, taken, why, self._jobs.text_digest)

    def _open(self, planned: Planned) -> Job | None:
        """The cell's job; None if its checkpoint can't be opened, which fails the cell only."""
        self._tell(f"opening {planned.cell.model}")
        try:
            job = self._jobs.job(planned.cell)
        except GemmaError as error:
            self._fail(planned.cell.name, Failure(Stage.EXPORT, str(error)))
            return None
        if not self._how.resume:
            forget(job)
        flags = ("gemma-export", *export_flags(planned.cell, job))
        result = self._results[planned.cell.name]
        bundle = job.bundle.relative_to(job.folder).as_posix()
        self._results[result.name] = replace(result, command=shlex.join(flags), bundle=bundle)
        return job

    def _take_over(self, job: Job) -> bool:
        """Take over a cell whose stages are all finished. Returns whether it was one."""
        if unfinished(job):
            return False
        self._finish(job, is_reused=True)
        return self._results[job.cell].figures is not None

    def _work(self, jobs: Sequence[Job], scheduler: Scheduler) -> None:
        """Prepare groups of cells; measure each cell while nothing else runs on this machine."""
        groups = _by_weights(jobs, self._planned)
        batches = [[group] for group in groups] if scheduler.is_alone else [groups]
        for batch in batches:
            ready = self._prepare(batch, scheduler)
            for job in (job for group in batch for job in group):
                if job.cell in ready:
                    self._measure(job)

    def _prepare(self, groups: Sequence[Sequence[Job]], scheduler: Scheduler) -> set[str]:
        """Export and evaluate; returns the cells that are ready to be measured."""
        self._tell(f"exporting and evaluating {sum(map(len, groups))} cells")
        waiting: dict[Future[Outcome], Sequence[Job]] = {}
        for group in groups:
            memory = max(self._export_peak(job) for job in group)
            prepared = [_until_bench(job) for job in group]
            waiting[scheduler.submit(prepared, memory)] = group
        ready: set[str] = set()
        for future in as_completed(waiting):
            for cell, failure in outcome_of(future, waiting[future]).items():
                if failure is None:
                    ready.add(cell)
                else:
                    self._fail(cell, failure)
        return ready

    def _measure(self, job: Job) -> None:
        """Measure speed and memory, if they are asked for; then the cell is finished."""
        if Stage.BENCH in self._question.stages:
            self._tell(f"measuring {job.cell}")
            if (failure := run_job(job, Processes())) is not None:
                self._fail(job.cell, failure)
                return
        self._finish(job)

    def _finish(self, job: Job, is_reused: bool = False) -> None:
        tasks = self._question.tasks
        try:
            figures = read_figures(job, listed(tasks.names) if tasks else ())
        except GemmaError as error:
            self._fail(job.cell, Failure(job.steps[-1].stage, str(error)))
            return
        seconds = {stage: done.seconds for stage, done in read_done(job).items()}
        result = self._results[job.cell]
        result = replace(result, figures=figures, seconds=seconds, is_reused=is_reused)
        self._advance(result)

    def _fail(self, cell: str, failure: Failure) -> None:
        result, reason = self._results[cell], f"{failure.stage}: {failure.reason}"
        self._advance(replace(result, state=State.FAILED, reason=reason, bundle=None))

    def _advance(self, result: Result) -> None:
        self._results[result.name] = result
        ended = [
            one
            for one in self._results.values()
            if one.state is State.FAILED or one.figures is not None
        ]
        possible = sum(one.ruled_out is None for one in self._planned.values())
        self._advanced(result, len(ended), possible)

    def _export_peak(self, job: Job) -> int:
        estimate = self._planned[job.cell].estimate
        return 0 if estimate is None else estimate.export_peak


def _until_bench(job: Job) -> Job:
    return replace(job, steps=tuple(step for step in job.steps if step.stage is not Stage.BENCH))


def _by_weights(jobs: Sequence[Job], planned: Mapping[str, Planned]) -> list[list[Job]]:
    """Cells with the same rounded weights together: one worker rounds them once."""
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        request = planned[job.cell].cell.request
        rules = None if request.recipe is None else (request.recipe.rules, request.recipe.distilled)
        groups.setdefault((request.model, rules, request.bits), []).append(job)
    return list(groups.values())


def _planned(planned: Planned) -> Result:
    state = State.PLANNED if planned.ruled_out is None else State.RULED_OUT
    return result_of(planned.cell, state, planned.ruled_out or "", planned.estimate)


def _search(
    question: Question,
    results: Sequence[Result],
    take: str | None,
    why: str,
    text_digest: str | None = None,
) -> Search:
    return Search(
        file=question.path.name,
        machine=describe_machine(("gemma-export", "onnxruntime", "torch")),
        objectives=question.objectives,
        limits=question.limits,
        text_digest=text_digest,
        cells=tuple(results),
        take=take,
        why=why,
        warnings=tuple(_busy(results)),
    )


def _busy(results: Sequence[Result]) -> Iterator[str]:
    """A warning if other programs may have slowed measurements down."""
    known = [one.figures.others for one in results if one.figures and one.figures.others]
    busy = [share for share in known if share > _IDLE]
    if busy:
        yield (
            f"before {len(busy)} of the bundles were measured, other programs used up to "
            f"{max(busy):.0%} of the processor, so times may be too long; measure again with "
            "--no-resume when the machine is idle"
        )
