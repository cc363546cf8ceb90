"""Measures one bundle in its own process, so that memory and cold times are that bundle's alone.

`python -m gemma_runtime.measure.bench_worker` reads a Job from stdin and writes the figures to
stdout, both as JSON.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import GemmaError
from gemma_runtime.machine import (
    Memory,
    drop_page_cache,
    measure_memory,
    measure_touched,
    storage_bytes_read,
)
from gemma_runtime.session import Session, open_session

Clock = Callable[[], float]  # seconds
_PR_SET_THP_DISABLE = 41  # of prctl(2): no transparent huge pages


@dataclass(frozen=True, slots=True)
class Workload:
    """What one run of a bundle processes."""

    threads: int
    prompt_lengths: tuple[int, ...]  # in tokens, shortest first
    decode_prompt: int  # that of these prompts after which the main figures of decoding are taken
    new_tokens: int


class Part(StrEnum):
    COLD = "cold"  # a ColdStart
    WARM = "warm"  # a WarmRun
    TOUCHED = "touched"  # bytes of memory that a new token uses


@dataclass(frozen=True, slots=True)
class Job:
    directory: str
    workload: Workload
    part: Part


@dataclass(frozen=True, slots=True)
class ColdStart:
    """A start with no part of the artifact in the page cache."""

    load_ms: float
    first_token_ms: float  # load, prefill of the shortest prompt, and argmax
    read_bytes: int  # bytes that the system read from storage during the start


@dataclass(frozen=True, slots=True)
class PromptTime:
    tokens: int
    prefill_ms: float
    first_token_ms: float  # prefill and argmax
    token_ms: tuple[float, ...]  # decode and argmax, for each new token; none without room for all


@dataclass(frozen=True, slots=True)
class Timings:
    prompts: tuple[PromptTime, ...]


@dataclass(frozen=True, slots=True)
class WarmRun:
    check_ms: float  # opening the bundle, with the digests of all files
    load_ms: float
    timings: Timings
    before: Memory  # before the artifact is loaded: interpreter and libraries
    memory: Memory  # at the end


def measure_cold(
    bundle: Bundle, workload: Workload, clock: Clock = perf_counter
) -> ColdStart | None:
    """Drop the artifact from the page cache, then load it and compute the first token.

    None if the system can't drop pages or kept them, which shows in few bytes read from storage.
    """
    files = artifact_files(bundle)
    read_before = storage_bytes_read()
    if read_before is None or not drop_page_cache(files):
        return None
    started = clock()
    with open_session(bundle, workload.threads) as session:
        loaded = clock()
        prompt = random_tokens(bundle.manifest.vocab_size, workload.prompt_lengths[0])
        int(session.prefill(prompt).argmax())
        done = clock()
    read = (storage_bytes_read() or 0) - read_before
    if read < sum(path.stat().st_size for path in files) // 2:
        return None
    return ColdStart((loaded - started) * 1e3, (done - started) * 1e3, read)


def measure_warm(directory: Path, workload: Workload, clock: Clock = perf_counter) -> WarmRun:
    """Open, load and run a bundle with its files in the page cache."""
    started = clock()
    bundle = open_bundle(directory)  # reads every file
    checked = clock()
    before = measure_memory()
    load_started = clock()
    with open_session(bundle, workload.threads) as session:
        loaded = clock()
        timings = measure_session(session, bundle.manifest.vocab_size, workload, clock)
        memory = measure_memory()
    check_ms, load_ms = (checked - started) * 1e3, (loaded - load_started) * 1e3
    return WarmRun(check_ms, load_ms, timings, before, memory)


def measure_token(bundle: Bundle, workload: Workload) -> int | None:
    """Bytes of memory that one new token reads or writes; None if the system doesn't tell."""
    _use_small_pages()
    with open_session(bundle, workload.threads) as session:
        prompt = random_tokens(bundle.manifest.vocab_size, workload.decode_prompt)
        token = int(session.prefill(prompt).argmax())
        return measure_touched(lambda: session.decode(token))


def _use_small_pages() -> None:
    """No page of 2 MiB in this process: pages are counted whole."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def measure_session(
    session: Session, vocab_size: int, workload: Workload, clock: Clock = perf_counter
) -> Timings:
    """Time prompts and the new tokens after each, after an untimed prompt of the longest length."""
    session.prefill(random_tokens(vocab_size, workload.prompt_lengths[-1]))
    return Timings(
        tuple(
            _time_prompt(session, random_tokens(vocab_size, length), workload.new_tokens, clock)
            for length in workload.prompt_lengths
        )
    )


def random_tokens(vocab_size: int, count: int) -> list[int]:
    """`count` ids, the same every time. Speed doesn't depend on their meaning."""
    return [int(token) for token in np.random.default_rng(count).integers(0, vocab_size, count)]


def artifact_files(bundle: Bundle) -> list[Path]:
    """The files that the runtime loads: all except those with a role, such as the tokenizer."""
    names = sorted(set(bundle.manifest.files) - set(bundle.manifest.roles.values()))
    return [bundle.directory / name for name in names]


def _time_prompt(session: Session, tokens: list[int], new_tokens: int, clock: Clock) -> PromptTime:
    session.reset()
    started = clock()
    logits = session.prefill(tokens)
    prefilled = clock()
    token = int(logits.argmax())
    chosen = clock()
    fits = len(tokens) + new_tokens <= session.context_length
    return PromptTime(
        len(tokens),
        (prefilled - started) * 1e3,
        (chosen - started) * 1e3,
        _time_tokens(session, token, new_tokens if fits else 0, clock),
    )


def _time_tokens(session: Session, token: int, count: int, clock: Clock) -> tuple[float, ...]:
    token_ms = []
    for _ in range(count):
        started = clock()
        token = int(session.decode(token).argmax())
        token_ms.append((clock() - started) * 1e3)
    return tuple(token_ms)


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    directory = Path(job.directory)
    figures: object
    try:
        match job.part:
            case Part.COLD:
                figures = measure_cold(open_bundle(directory), job.workload)
            case Part.WARM:
                figures = measure_warm(directory, job.workload)
            case Part.TOUCHED:
                figures = measure_token(open_bundle(directory), job.workload)
    except GemmaError as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
