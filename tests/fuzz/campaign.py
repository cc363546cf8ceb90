"""Runs one reader on many inputs: guided by coverage if atheris is installed, else by chance alone.

https://github.com/google/atheris
"""

import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import msgspec

_LONGEST = 1 << 17  # bytes of an input
_PACKAGES = ["gemma_runtime", "gemma_export", "gemma_conformance"]


class Finding(msgspec.Struct, frozen=True):
    problem: str
    file: str  # the input, kept


class Tally(msgspec.Struct):
    """What became of a reader's inputs."""

    reader: str
    engine: str  # atheris or chance
    runs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    most_added_bytes: int = 0
    findings: list[Finding] = []


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def run_reader(name: str, runs: int, seconds: float, seed: int, kept: Path) -> NoReturn:
    """Run in this process, which then prints its tally as JSON and ends.

    `seconds` of 0 means no limit. Inputs that are findings are written into `kept`.
    """
    atheris: Any = importlib.import_module("atheris") if has_atheris() else None
    if atheris is None:
        from tests.fuzz.readers import READERS
    else:
        # Modules are instrumented as they are imported, so not before.
        with atheris.instrument_imports(include=_PACKAGES):
            from tests.fuzz.readers import READERS
    seeds = READERS[name].inputs(name)
    tally = Tally(name, "atheris" if atheris else "chance")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "reader").mkdir()
        read = READERS[name].open(Path(folder) / "reader")
        one = _judged(read, tally, runs, seconds, kept)
        for data in seeds:
            one(data)
        if atheris is not None:
            _guided(atheris, one, seeds, seed, Path(folder) / "corpus")
        chance = random.Random(seed)
        from tests.fuzz.mutate import mutate

        while True:
            one(mutate(chance, seeds))


def _judged(
    read: Callable[[bytes], object], tally: Tally, runs: int, seconds: float, kept: Path
) -> Callable[[bytes], None]:
    """A function that reads an input, counts it, and ends the process after the last one."""
    from tests.fuzz.judge import judge

    known: set[str] = set()
    started = time.monotonic()

    def one(data: bytes) -> None:
        verdict = judge(read, data)
        tally.runs += 1
        tally.accepted += verdict.accepted
        tally.slowest_seconds = max(tally.slowest_seconds, verdict.seconds)
        tally.most_added_bytes = max(tally.most_added_bytes, verdict.added_bytes)
        if verdict.problem and verdict.problem[:60] not in known:
            known.add(verdict.problem[:60])
            file = kept / tally.reader / sha256(data).hexdigest()[:12]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            tally.findings.append(Finding(verdict.problem, str(file)))
        tally.seconds = time.monotonic() - started
        if tally.runs >= runs or 0 < seconds < tally.seconds:
            sys.stdout.buffer.write(msgspec.json.encode(tally) + b"\n")
            sys.stdout.flush()
            os._exit(0)  # libFuzzer doesn't return

    return one


def _guided(
    atheris: Any, one: Callable[[bytes], None], seeds: list[bytes], seed: int, corpus: Path
) -> None:
    from tests.fuzz.mutate import mutate

    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def changed(data: bytes, longest: int, number: int) -> bytes:
        """Half of the changes are libFuzzer's own, half know JSON."""
        chance = random.Random(number)
        if chance.random() < 0.5:
            own: bytes = atheris.Mutate(data, longest)
            return own
        return mutate(chance, [data, data, *seeds])[:longest]

    flags = [f"-seed={seed + 1}", f"-max_len={_LONGEST}", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=changed)
    atheris.Fuzz()
