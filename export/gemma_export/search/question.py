"""What a search file asks: cells to try, measures to compare them by, and limits to keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gemma_export.memory import parse_bytes
from gemma_export.search.cells import Cell, find_cells
from gemma_export.search.measures import MEASURES, Stage
from gemma_export.search.schema import Bench, Limits, SearchFile, Tasks, listed, read_search
from gemma_export.search.yaml_file import exists, place
from gemma_runtime.errors import GemmaError, SearchError, nearest_first

_DEFAULT = ("kl", "resident", "decode")
_MINUTES = "minutes"


@dataclass(frozen=True, slots=True)
class Question:
    path: Path
    cells: tuple[Cell, ...]
    is_open: bool  # the file names no recipes: those that a target can't hold are left out
    objectives: tuple[str, ...]  # names of measures; the first decides between equals
    limits: Mapping[str, float]  # measure → what the bundle to take must keep to
    minutes: float | None  # that an export may take
    stages: frozenset[Stage]  # what is done for each cell
    text: Path | None
    tasks: Tasks | None
    bench: Bench

    @property
    def includes(self) -> list[Path]:
        """Folders with task files."""
        names = listed(self.tasks.include) if self.tasks else ()
        return [place(self.path.parent, name) for name in names]


def ask(path: Path) -> Question:
    """Read a search file and check all that needs no checkpoint. Raises SearchError."""
    path = path.absolute()
    file = read_search(path)
    try:
        return _ask(path, file)
    except GemmaError as error:
        raise SearchError(f"{path}: {error}") from error
    except OverflowError as error:
        raise SearchError(f"{path} has a number that is too large") from error


def _ask(path: Path, file: SearchFile) -> Question:
    tasks = _tasks(file.tasks)
    objectives = _objectives(file, tasks)
    limits = _limits(file.budget)
    stages = _stages([*objectives, *limits], tasks)
    _check_bench(file.bench)
    text = None if file.text is None else place(path.parent, file.text)
    if Stage.EVAL in stages:
        _check_text(text, file)
    cells = find_cells(file, path.parent, text if Stage.EVAL in stages else None)
    return Question(
        path=path,
        cells=cells,
        is_open=file.recipes is None,
        objectives=objectives,
        limits=limits,
        minutes=file.budget.minutes,
        stages=stages,
        text=text if Stage.EVAL in stages else None,
        tasks=tasks,
        bench=file.bench,
    )


def _tasks(given: str | tuple[str, ...] | Tasks | None) -> Tasks | None:
    if given is None or isinstance(given, Tasks):
        return given
    return Tasks(names=given)


def _objectives(file: SearchFile, tasks: Tasks | None) -> tuple[str, ...]:
    given = file.objectives
    if given is None:
        return (*_DEFAULT, "score") if tasks else _DEFAULT
    names = tuple(dict.fromkeys(listed(given)))
    for name in names:
        if name not in MEASURES:
            raise SearchError(
                f"objectives: unknown measure {name!r}; choose from {nearest_first(name, MEASURES)}"
            )
    if not names:
        raise SearchError("objectives is empty; name a measure, or leave it out")
    return names


def _limits(budget: Limits) -> dict[str, float]:
    """The limits by measure, bytes as numbers."""
    given = {
        name: value for name, value in msgspec.structs.asdict(budget).items() if value is not None
    }
    limits = {
        name: float(parse_bytes(value) if isinstance(value, str) else value)
        for name, value in given.items()
    }
    for name, limit in limits.items():
        if not limit > 0:
            raise SearchError(f"budget.{name} is {limit:g}; expected more than 0")
        if name == "top1" and limit > 1:
            raise SearchError(f"budget.top1 is {limit:g}; expected a share, such as 0.9")
    return {name: limit for name, limit in limits.items() if name != _MINUTES}


def _stages(names: Sequence[str], tasks: Tasks | None) -> frozenset[Stage]:
    stages = {MEASURES[name].stage for name in names} | {Stage.EXPORT}
    if Stage.TASKS in stages and tasks is None:
        raise SearchError("score is asked for, but no tasks are; add tasks")
    if tasks is not None:
        stages.add(Stage.TASKS)
    if stages != {Stage.EXPORT}:
        stages.add(Stage.VERIFY)
    return frozenset(stages)


def _check_text(text: Path | None, file: SearchFile) -> None:
    if text is None:
        raise SearchError(
            "text is missing; give a file or folder of text that no recipe has read, or set "
            "objectives and budget without kl, worst_kl and top1"
        )
    if not exists(text):
        raise SearchError(f"text: {text} does not exist")
    if file.calibration is not None and file.calibration == file.text:
        raise SearchError(
            "text and calibration are the same; recipes would be judged on what they were fitted to"
        )


def _check_bench(bench: Bench) -> None:
    for name, value in msgspec.structs.asdict(bench).items():
        if value is not None and value < 1:
            raise SearchError(f"bench.{name} is {value}; expected 1 or more")
