"""Reads the figures of a finished cell, as its stages printed them."""

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

import msgspec

from gemma_export.search.job import Job, read_done, read_manifest
from gemma_export.search.measures import Figures, Stage
from gemma_runtime.errors import SearchError
from gemma_runtime.measure.bench import Benchmark
from gemma_runtime.report.figures import Evaluated, Verified, read_source

_PROMPT = 512  # tokens


class _Scores(msgspec.Struct, frozen=True):
    """What is read of lm_eval's results: `METRIC,FILTER` → value, by task."""

    results: dict[str, dict[str, Any]]
    higher_is_better: dict[str, dict[str, bool | None]] = {}


def read_figures(job: Job, names: tuple[str, ...]) -> Figures:
    """The figures of a cell whose stages are finished. `names` are the tasks asked for.

    Raises a GemmaError for files that are not figures, and for a model that gives no numbers.
    """
    manifest = read_manifest(job)
    artifact = sorted(set(manifest.files) - set(manifest.roles.values()))
    found: dict[str, Any] = {}
    for step in job.steps:
        if step.stage is not Stage.EXPORT:
            found |= _read(step.stage, job.file(step.stage), names)
    for name, value in found.items():
        if isinstance(value, float) and isnan(value):
            raise SearchError(f"{name} is not a number: the quantized model is broken")
    return Figures(
        bits_per_weight=manifest.quantization.bits_per_weight,
        size=sum(manifest.files[name].bytes for name in artifact),
        weights_kl=manifest.quality.mean_kl,
        others=done.others if (done := read_done(job).get(Stage.BENCH)) else None,
        **found,
    )


def _read(stage: Stage, file: Path, names: tuple[str, ...]) -> Mapping[str, Any]:
    if stage is Stage.TASKS:
        return {"score": read_score(file, names)}
    figures = read_source(file).figures
    if isinstance(figures, Verified):
        return {"verdict": figures.verification.verdict.value}
    if isinstance(figures, Evaluated):
        return _evaluated(figures, file)
    assert isinstance(figures, Benchmark)  # the only other stage
    (one,) = figures.bundles
    # Not always the longest: a search that goes on may have figures that end at 512 tokens.
    prompt = max((p for p in one.prompts if p.tokens <= _PROMPT), key=lambda p: p.tokens)
    return {
        "decode": one.decode_tokens_per_second.median,
        "prefill": prompt.tokens_per_second.median,
        "first_token": prompt.first_token_ms.median / 1e3,
        "load": one.load_ms.median / 1e3,
        "resident": one.peak_rss_bytes.median,
    }


def _evaluated(figures: Evaluated, file: Path) -> Mapping[str, Any]:
    evaluation = figures.evaluation
    teacher, worst = evaluation.total.teacher, evaluation.texts[0]
    if teacher is None or worst.teacher is None:
        raise SearchError(f"{file} has no KL: the bundle has no teacher for its text")
    return {
        "kl": teacher.kl.value,
        "top1": teacher.top1,
        "worst_language": worst.name,
        "worst_kl": worst.teacher.kl.value,
    }


def read_score(file: Path, names: tuple[str, ...]) -> float:
    """The mean over the tasks and groups asked for, each by its first metric to be high."""
    try:
        scores = msgspec.json.decode(file.read_bytes(), type=_Scores)
    except (OSError, msgspec.DecodeError) as error:
        raise SearchError(f"{file} is not lm_eval's results: {error}") from error
    asked = [name for name in names if name in scores.results] or list(scores.results)
    values = [_main_metric(name, scores) for name in asked]
    return sum(values) / len(values)


def _main_metric(task: str, scores: _Scores) -> float:
    better = scores.higher_is_better.get(task, {})
    for name, value in scores.results[task].items():
        if isinstance(value, int | float) and better.get(name.partition(",")[0]):
            return float(value)
    raise SearchError(f"task {task} has no metric of which more is better; leave it out of tasks")
