"""Reads a run of lm_eval: `results_DATE.json` and one `samples_TASK_DATE.jsonl` for each task."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from gemma_runtime.errors import EvaluationError
from gemma_runtime.formats.names import is_file_name
from gemma_runtime.proof.agreement import Floats

T = TypeVar("T")

_SUBJECTS = ("subject", "category")  # fields of a question that name what it belongs to


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to one question, as one of the task's filters read it. C choices."""

    key: tuple[str, str, int]  # filter, digest of the question, how many equal ones came before
    prompt: tuple[str, str]  # digests of the prompt and of the expected answer
    subject: str | None
    scores: Mapping[str, float]  # by metric, only those that are numbers
    choices: Floats | None  # log-likelihoods, (C,), of a multiple-choice question
    right: int | None  # index of the right choice
    text: str  # a generated answer, or ""


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One call of lm_eval."""

    path: Path  # of results_DATE.json
    model: str
    artifact: str  # equal for two runs of the same files
    tasks: Mapping[str, tuple[Answer, ...]]
    groups: Mapping[str, tuple[str, ...]]  # tasks of each group


_DIGITS = 10  # of an index


class _Results(msgspec.Struct):
    config: dict[str, Any]
    configs: dict[str, Any]
    group_subtasks: dict[str, list[str]] = {}


class _Sample(msgspec.Struct):
    doc: Any
    target: Any
    resps: list[Any]
    filtered_resps: list[Any]
    doc_hash: str
    prompt_hash: str
    target_hash: str
    arguments: dict[str, Any]
    metrics: list[str]
    filter: str


def open_task_run(path: Path) -> TaskRun:
    """Read a results file, or the newest one in a folder or in its only subfolder.

    Raises EvaluationError if there is none, or if a file is not lm_eval's.
    """
    file = _results_file(path)
    results = _convert(_load(file.read_bytes(), file), _Results, file)
    date = file.stem.removeprefix("results_")
    if outside := [task for task in results.configs if not is_file_name(task)]:
        raise EvaluationError(f"{file} names the task {outside[0]!r}, outside of its folder")
    samples = {task: file.parent / f"samples_{task}_{date}.jsonl" for task in results.configs}
    missing = next((task for task, place in samples.items() if not place.is_file()), None)
    if missing is not None:
        raise EvaluationError(
            f"{file.parent} has no answers to the questions of {missing}, expected "
            f"{samples[missing].name}; run lm_eval with --log_samples"
        )
    config = results.config
    name = f"{config.get('model')} {config.get('model_args') or ''}".strip()
    return TaskRun(
        path=file,
        model=str(config.get("bundle") or name),
        artifact=str(config.get("bundle_digest") or name),
        tasks={task: tuple(_answers(place)) for task, place in samples.items()},
        groups={
            group: tuple(_leaves(group, results))
            for group, members in results.group_subtasks.items()
            if members
        },
    )


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("results_*.json")) or sorted(path.glob("*/results_*.json"))
    folders = sorted({file.parent.name for file in found})
    if len(folders) > 1:
        raise EvaluationError(f"{path} has runs of {', '.join(folders)}; name one of these folders")
    if not found:
        raise EvaluationError(
            f"{path} has no results_*.json; expected an output folder of gemma-runtime lm-eval or "
            "of lm_eval --output_path … --log_samples"
        )
    return found[-1]  # the names sort by date


def _leaves(group: str, results: _Results, depth: int = 0) -> Iterator[str]:
    """The group's tasks, also those of its groups."""
    if depth > len(results.group_subtasks):
        raise EvaluationError(f"lm_eval's group {group} contains itself; run lm_eval again")
    for member in results.group_subtasks.get(group, ()):
        if results.group_subtasks.get(member):
            yield from _leaves(member, results, depth + 1)
        elif member in results.configs:
            yield member


def _answers(path: Path) -> Iterator[Answer]:
    seen: Counter[tuple[str, str]] = Counter()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"line {number} of {path}"
            fields = _load(line, place)
            sample = _convert(fields, _Sample, place)
            pair = (sample.filter, sample.doc_hash)
            yield _answer(sample, fields, (*pair, seen[pair]), place)
            seen[pair] += 1


def _answer(
    sample: _Sample, fields: Mapping[str, object], key: tuple[str, str, int], place: str
) -> Answer:
    named = {name: fields.get(name) for name in sample.metrics}
    try:
        scores = {name: float(x) for name, x in named.items() if isinstance(x, int | float)}
        choices = _choices(sample)
    except (OverflowError, TypeError, ValueError) as error:
        raise EvaluationError(f"{place} has a wrong likelihood: {error}") from error
    return Answer(
        key=key,
        prompt=(sample.prompt_hash, sample.target_hash),
        subject=_subject(sample.doc),
        scores=scores,
        choices=choices,
        right=None if choices is None else _right(sample, len(choices)),
        text="" if choices is not None else json.dumps(sample.filtered_resps),
    )


def _choices(sample: _Sample) -> Floats | None:
    """Log-likelihoods, which lm_eval writes as [["-1.5", "False"]] for each choice."""
    first = [resp[0] for resp in sample.resps if isinstance(resp, list) and resp]
    pairs = [pair for pair in first if isinstance(pair, list) and len(pair) == 2]
    if not pairs or len(pairs) != len(sample.resps):
        return None
    if "acc_mutual_info" in sample.metrics:  # the second half has no question
        pairs = pairs[: len(pairs) // 2]
    return np.array([float(likelihood) for likelihood, _ in pairs])


def _right(sample: _Sample, count: int) -> int | None:
    """Index of the right choice; None if the task gives several, or only the text of one."""
    if count == 1:
        return 0
    target = str(sample.target)
    if target.isdecimal():
        index = int(target) if len(target) < _DIGITS else count
        return index if index < count else None
    asked = [sample.arguments.get(f"gen_args_{i}") for i in range(count)]
    texts = [one.get("arg_1") if isinstance(one, Mapping) else None for one in asked]
    same = [i for i, text in enumerate(texts) if isinstance(text, str) and text.strip() == target]
    return same[0] if len(same) == 1 else None


def _subject(doc: object) -> str | None:
    if not isinstance(doc, Mapping):
        return None
    return next((str(doc[field]) for field in _SUBJECTS if field in doc), None)


def _load(raw: bytes, place: object) -> Any:
    """By the standard library, because lm_eval writes NaN."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{place} is not JSON: {error}") from error


def _convert(value: object, kind: type[T], place: object) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise EvaluationError(f"{place} is not lm_eval's: {error}") from error
