"""What one process measures of one bundle, so that memory and first times are the bundle's own.

`python -m gemma_runtime.measure.bench_worker` reads an Order from stdin and writes the figures to
stdout, both as JSON.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import GemmaError
from gemma_runtime.machine import Memory, drop_page_cache, measure_memory, storage_bytes_read
from gemma_runtime.session import Session, open_session

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True, slots=True)
class Workload:
    """The tokens that are run. Lengths of prompts, shortest first."""

    threads: int
    prompt_lengths: tuple[int, ...]
    decode_prompt: int  # tokens in the cache before the first timed new token
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Order:
    directory: str
    workload: Workload
    cold: bool  # a ColdStart is wanted, else a WarmRun


@dataclass(frozen=True, slots=True)
class ColdStart:
    """A start with none of the bundle's artifact in the page cache."""

    load_ms: float
    first_token_ms: float  # load, shortest prompt and choice together
    read_bytes: int  # what the system fetched from storage meanwhile


@dataclass(frozen=True, slots=True)
class PromptTime:
    tokens: int
    prefill_ms: float
    first_token_ms: float  # prefill, and the choice of the most likely token


@dataclass(frozen=True, slots=True)
class Timings:
    prompts: tuple[PromptTime, ...]
    token_ms: tuple[float, ...]  # each new token: decode, and the choice of the most likely one


@dataclass(frozen=True, slots=True)
class WarmRun:
    check_ms: float  # opening the bundle, digests included
    load_ms: float
    timings: Timings
    before: Memory  # interpreter and libraries, before the artifact was loaded
    memory: Memory


def measure_cold(
    bundle: Bundle, workload: Workload, clock: Clock = perf_counter
) -> ColdStart | None:
    """Drop the artifact from the page cache, then load it and choose a token.

    None if the system can't drop pages, or kept them: then hardly anything is read from storage.
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
    """Open, load and run a bundle whose files are in the page cache."""
    started = clock()
    bundle = open_bundle(directory)  # reads every file
    checked = clock()
    before = measure_memory()
    begun = clock()
    with open_session(bundle, workload.threads) as session:
        loaded = clock()
        timings = measure_session(session, bundle.manifest.vocab_size, workload, clock)
        memory = measure_memory()
    return WarmRun((checked - started) * 1e3, (loaded - begun) * 1e3, timings, before, memory)


def measure_session(
    session: Session, vocab_size: int, workload: Workload, clock: Clock = perf_counter
) -> Timings:
    """Time prompts and new tokens, after one untimed prompt of the longest length."""
    session.prefill(random_tokens(vocab_size, workload.prompt_lengths[-1]))
    prompts = tuple(
        _time_prompt(session, random_tokens(vocab_size, length), clock)
        for length in workload.prompt_lengths
    )
    session.reset()
    prompt = random_tokens(vocab_size, workload.decode_prompt)
    token = int(session.prefill(prompt).argmax())
    token_ms = []
    for _ in range(workload.new_tokens):
        started = clock()
        token = int(session.decode(token).argmax())
        token_ms.append((clock() - started) * 1e3)
    return Timings(prompts, tuple(token_ms))


def random_tokens(vocab_size: int, count: int) -> list[int]:
    """The same ids every time: speed doesn't depend on what they mean."""
    return [int(token) for token in np.random.default_rng(count).integers(0, vocab_size, count)]


def artifact_files(bundle: Bundle) -> list[Path]:
    """What the runtime loads: every file that plays no role beside it."""
    names = sorted(set(bundle.manifest.files) - set(bundle.manifest.roles.values()))
    return [bundle.directory / name for name in names]


def _time_prompt(session: Session, tokens: list[int], clock: Clock) -> PromptTime:
    session.reset()
    started = clock()
    logits = session.prefill(tokens)
    filled = clock()
    int(logits.argmax())
    chosen = clock()
    return PromptTime(len(tokens), (filled - started) * 1e3, (chosen - started) * 1e3)


def main() -> int:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    directory = Path(order.directory)
    try:
        figures = (
            measure_cold(open_bundle(directory), order.workload)
            if order.cold
            else measure_warm(directory, order.workload)
        )
    except GemmaError as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
