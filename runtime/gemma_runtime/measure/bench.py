"""Measures a bundle's speed and memory, and compares its speed with the memory bandwidth.

Each repeat of each bundle runs in its own processes. Bundles take turns (A, B, A, B, …), so that
all are affected alike when the machine warms up or gets busy. Figures are medians over the repeats.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Protocol

import msgspec
import numpy as np

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.machine import (
    Machine,
    check_threads,
    describe_machine,
    is_busy,
    load_average,
    measure_bandwidth,
    physical_cores,
)
from gemma_runtime.manifest import AttentionKind, Manifest
from gemma_runtime.measure.bench_worker import (
    ColdStart,
    Job,
    Part,
    WarmRun,
    Workload,
    artifact_files,
)

PROMPT_LENGTHS = (32, 128, 512, 2048)  # as in Bench.kt and Bench.swift
DECODE_PROMPT = 128


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest value of one figure over the repeats."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PromptFigures:
    tokens: int
    first_token_ms: Spread
    tokens_per_second: Spread  # of prefill
    # After the prompt. None if the context has no room for the new tokens, and in earlier files.
    decode_tokens_per_second: Spread | None = None


@dataclass(frozen=True, slots=True)
class BundleFigures:
    bundle: str
    digest: str  # `Bundle.digest`
    model: str
    recipe: str
    target: str
    artifact_bytes: int
    cache_bytes: dict[str, int]  # by attention kind
    load_cold_ms: Spread | None  # None if the page cache can't be dropped
    first_token_cold_ms: Spread | None  # load and the shortest prompt together
    check_ms: Spread  # opening the bundle, with the digests of all files
    load_ms: Spread
    prompts: tuple[PromptFigures, ...]
    decode_tokens_per_second: Spread
    token_ms: Spread  # median time per new token, for each repeat
    token_p95_ms: Spread
    bytes_per_token: int  # all weights once, as stored, and the keys and values attended to
    bandwidth_share: float  # touched bytes per second, else stored ones / measured bandwidth
    peak_rss_bytes: Spread
    before_rss_bytes: Spread  # peak before the artifact is loaded: interpreter and libraries
    anonymous_bytes: Spread | None  # at the end: heap, caches, repacked weights
    file_bytes: Spread | None  # at the end: mapped files
    ratios: dict[str, float]  # figure -> its median / the first bundle's median
    # Memory that a new token uses, as the system tells it; None if it doesn't.
    touched_bytes_per_token: int | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    machine: Machine
    threads: int
    repeats: int
    new_tokens: int
    load_before: float  # load average over the minute before
    load_after: float  # load average afterwards, including the benchmark itself
    bandwidth_bytes_per_second: float
    bundles: tuple[BundleFigures, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Samples:
    """The results of all repeats of one bundle."""

    bundle: Bundle
    workload: Workload
    cold: list[ColdStart | None]
    warm: list[WarmRun]
    touched: int | None = None  # bytes


def measure(
    directories: Sequence[Path],
    *,
    threads: int | None = None,
    repeats: int = 5,
    new_tokens: int = 64,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Benchmark:
    """Measure bundles in turn. Raises BundleError or SessionError if one can't run."""
    check_threads(threads)
    threads = threads or physical_cores()
    bundles = [open_bundle(directory) for directory in directories]
    all_samples = [
        Samples(b, fit_workload(b.manifest, threads, new_tokens), [], []) for b in bundles
    ]
    load_before = load_average()
    on_progress("memory bandwidth")
    bandwidth = measure_bandwidth(threads)
    for repeat in range(repeats):
        for samples in all_samples:
            on_progress(f"{samples.bundle.directory} {repeat + 1}/{repeats}")
            samples.cold.append(_run_cold(samples))
            samples.warm.append(_run_warm(samples))
    all_samples = [replace(samples, touched=_run_touched(samples)) for samples in all_samples]
    return Benchmark(
        machine=describe_machine(chain.from_iterable(b.manifest.target.packages for b in bundles)),
        threads=threads,
        repeats=repeats,
        new_tokens=new_tokens,
        load_before=load_before,
        load_after=load_average(),
        bandwidth_bytes_per_second=bandwidth,
        bundles=compare([summarize(samples, bandwidth) for samples in all_samples]),
        warnings=_warnings(load_before, all_samples),
    )


class HasPrompts(Protocol):
    @property
    def prompts(self) -> tuple[PromptFigures, ...]: ...


def prompt_lengths(figures: Iterable[HasPrompts]) -> list[int]:
    """All lengths of prompts that any of them has, shortest first."""
    return sorted({prompt.tokens for one in figures for prompt in one.prompts})


def prompt_of(figures: HasPrompts, length: int) -> PromptFigures | None:
    """The figures of the prompt of this length; None if it was not measured."""
    return next((prompt for prompt in figures.prompts if prompt.tokens == length), None)


def fit_workload(manifest: Manifest, threads: int, new_tokens: int) -> Workload:
    """The standard prompt lengths that fit into the context, and one that leaves room to decode."""
    free = manifest.context_length - new_tokens
    if new_tokens < 1 or free < 1:
        raise SessionError(
            f"{new_tokens} new tokens don't fit into a context of {manifest.context_length}; "
            f"give 1 to {manifest.context_length - 1}"
        )
    fitting = {n for n in PROMPT_LENGTHS if n <= manifest.context_length}
    decode_prompt = min(DECODE_PROMPT, free)
    return Workload(
        threads=threads,
        prompt_lengths=tuple(sorted(fitting | {decode_prompt})),
        decode_prompt=decode_prompt,
        new_tokens=new_tokens,
    )


def summarize(samples: Samples, bandwidth: float) -> BundleFigures:
    """Reduce one bundle's repeats to its figures. `bandwidth` is in bytes per second."""
    manifest, warm = samples.bundle.manifest, samples.warm
    cold = samples.cold
    prompt = samples.workload.decode_prompt
    tokens = [_after(run, prompt) for run in warm]
    decode = spread(_tokens_per_second(token_ms) for token_ms in tokens)
    bytes_per_token = count_bytes_per_token(manifest, samples.workload)
    touched = _plausible(samples.touched, bytes_per_token)
    return BundleFigures(
        bundle=str(samples.bundle.directory),
        digest=samples.bundle.digest(),
        model=manifest.model.id,
        recipe=manifest.quantization.recipe,
        target=manifest.target.name,
        artifact_bytes=sum(path.stat().st_size for path in artifact_files(samples.bundle)),
        cache_bytes={kind.value: manifest.cache_bytes(kind) for kind in AttentionKind},
        load_cold_ms=_known(None if start is None else start.load_ms for start in cold),
        first_token_cold_ms=_known(
            None if start is None else start.first_token_ms for start in cold
        ),
        check_ms=spread(run.check_ms for run in warm),
        load_ms=spread(run.load_ms for run in warm),
        prompts=_prompt_figures(samples),
        decode_tokens_per_second=decode,
        token_ms=spread(median(token_ms) for token_ms in tokens),
        token_p95_ms=spread(float(np.quantile(token_ms, 0.95)) for token_ms in tokens),
        bytes_per_token=bytes_per_token,
        bandwidth_share=decode.median * (touched or bytes_per_token) / bandwidth,
        peak_rss_bytes=spread(run.memory.peak_bytes for run in warm),
        before_rss_bytes=spread(run.before.peak_bytes for run in warm),
        anonymous_bytes=_known(run.memory.anonymous_bytes for run in warm),
        file_bytes=_known(run.memory.file_bytes for run in warm),
        ratios={},
        touched_bytes_per_token=touched,
    )


def compare(bundles: Sequence[BundleFigures]) -> tuple[BundleFigures, ...]:
    """Add to each bundle the ratios to the first one."""
    first = _medians(bundles[0])
    return tuple(
        replace(
            bundle,
            ratios={
                name: value / first[name]
                for name, value in _medians(bundle).items()
                if first.get(name)
            },
        )
        for bundle in bundles
    )


def count_bytes_per_token(manifest: Manifest, workload: Workload) -> int:
    """Bytes that decoding reads per token: all weights once, and the visible part of the cache.

    An embedding table counts if it is also the head. Weights count with the recipe's bits (codes,
    scales and zero points). A runtime that repacks them may read more: `measure_token` tells.
    """
    width = np.dtype(manifest.cache_dtype).itemsize
    model = manifest.model
    weights = (model.parameters - model.looked_up) * manifest.quantization.bits_per_weight / 8
    middle = workload.decode_prompt + (workload.new_tokens + 1) // 2  # attended, on average
    caches = sum(
        2 * layer.kv_heads * layer.head_dim * width * min(middle, layer.window or middle)
        for layer in manifest.layers
    )
    return round(weights) + caches


def _plausible(touched: int | None, stored: int) -> int | None:
    """None if the weights are in another process, whose memory isn't told."""
    return None if touched is None or touched < stored / 2 else touched


def spread(values: Iterable[float]) -> Spread:
    samples = list(values)
    return Spread(median(samples), min(samples), max(samples))


def _run_cold(samples: Samples) -> ColdStart | None:
    return msgspec.json.decode(_run_worker(samples, Part.COLD), type=ColdStart | None)


def _run_warm(samples: Samples) -> WarmRun:
    return msgspec.json.decode(_run_worker(samples, Part.WARM), type=WarmRun)


def _run_touched(samples: Samples) -> int | None:
    return msgspec.json.decode(_run_worker(samples, Part.TOUCHED), type=int | None)


def _run_worker(samples: Samples, part: Part) -> bytes:
    job = Job(str(samples.bundle.directory), samples.workload, part)
    # -P: don't import a numpy.py from the working directory.
    worker = [sys.executable, "-P", "-m", "gemma_runtime.measure.bench_worker"]
    done = subprocess.run(worker, input=msgspec.json.encode(job), capture_output=True)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"its process exited with {done.returncode}"
        raise SessionError(f"{samples.bundle.directory} can't be measured: {reason}")
    return done.stdout


def _prompt_figures(samples: Samples) -> tuple[PromptFigures, ...]:
    by_length = zip(*(run.timings.prompts for run in samples.warm), strict=True)
    return tuple(
        PromptFigures(
            tokens=times[0].tokens,
            first_token_ms=spread(time.first_token_ms for time in times),
            tokens_per_second=spread(time.tokens / time.prefill_ms * 1e3 for time in times),
            decode_tokens_per_second=_known(
                _tokens_per_second(time.token_ms) if time.token_ms else None for time in times
            ),
        )
        for times in by_length
    )


def _after(run: WarmRun, prompt: int) -> tuple[float, ...]:
    """The times of the new tokens after the prompt of this length."""
    return next(time.token_ms for time in run.timings.prompts if time.tokens == prompt)


def _tokens_per_second(token_ms: Sequence[float]) -> float:
    return 1e3 * len(token_ms) / sum(token_ms)


def _known(values: Iterable[float | None]) -> Spread | None:
    """The spread, or None if any value is missing."""
    samples = list(values)
    known = [value for value in samples if value is not None]
    return spread(known) if known and len(known) == len(samples) else None


def _medians(bundle: BundleFigures) -> dict[str, float]:
    """The medians of all comparable figures, by field name."""
    named = {field.name: getattr(bundle, field.name) for field in fields(bundle)}
    medians = {name: value.median for name, value in named.items() if isinstance(value, Spread)}
    for prompt in bundle.prompts:
        medians[f"first_token_ms_{prompt.tokens}"] = prompt.first_token_ms.median
        medians[f"prefill_tokens_per_second_{prompt.tokens}"] = prompt.tokens_per_second.median
        if (decode := prompt.decode_tokens_per_second) is not None:
            medians[f"decode_tokens_per_second_{prompt.tokens}"] = decode.median
    return medians | {"artifact_bytes": bundle.artifact_bytes}


def busy_warnings(load: float) -> list[str]:
    """What to say of a load average before the measurement."""
    if not is_busy(load):
        return []
    return [
        f"the machine was busy (load {load:.1f} on {physical_cores()} cores), so times are too "
        "long; measure again when it is idle"
    ]


def _warnings(load_before: float, all_samples: Sequence[Samples]) -> tuple[str, ...]:
    warnings = busy_warnings(load_before)
    if any(start is None for samples in all_samples for start in samples.cold):
        warnings.append("no cold times: the system did not drop the files from its page cache")
    return tuple(warnings)
