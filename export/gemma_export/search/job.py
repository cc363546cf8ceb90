"""One cell's work on one machine: each stage in a process of its own, finished stages kept.

A worker runs `run_job`. What a stage prints as JSON becomes `figures/CELL/STAGE.json`, and
`figures/CELL/done.json` says for which inputs. So a memory peak is that stage's alone, a crash ends
one cell, and an interrupted search goes on after the last stage that finished.
"""

import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from gemma_export import __version__
from gemma_export.digest import digest_of
from gemma_export.search.measures import Stage
from gemma_export.search.processes import Processes
from gemma_runtime.backend_table import BACKENDS
from gemma_runtime.bundle import MANIFEST, sha256_file
from gemma_runtime.errors import BundleError
from gemma_runtime.machine import package_version, physical_cores, processor_name
from gemma_runtime.manifest import Manifest
from gemma_runtime.staging import staged_file

_DONE = "done.json"


@dataclass(frozen=True, slots=True)
class Done:
    """A finished stage."""

    key: str  # digest of its inputs
    seconds: float
    others: float | None = None  # share of the processor that other programs used just before


@dataclass(frozen=True, slots=True)
class Step:
    stage: Stage
    package: str  # whose command line it is
    arguments: tuple[str, ...]
    key: str  # of what it is asked; the bundle and the versions that run it are added


@dataclass(frozen=True, slots=True)
class Job:
    """A cell's stages, in order."""

    cell: str
    folder: Path  # of the search
    steps: tuple[Step, ...]
    recipe: str | None = None  # the content of a recipe file for the export
    token: str | None = None  # a file in the folder, by which another machine knows it
    version: str = __version__

    @property
    def bundle(self) -> Path:
        return self.folder / "bundles" / self.cell

    @property
    def figures(self) -> Path:
        return self.folder / "figures" / self.cell

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipes" / f"{self.cell}.yaml"

    def file(self, stage: Stage) -> Path:
        return self.figures / f"{stage}.json"


@dataclass(frozen=True, slots=True)
class Failure:
    stage: Stage
    reason: str  # one line


def run_job(job: Job, processes: Processes) -> Failure | None:
    """Run the stages that are not finished; stop at the first that fails."""
    if failure := _unfit(job):
        return failure
    if job.recipe is not None:
        with staged_file(job.recipe_file) as partial:
            partial.write_text(job.recipe, "utf-8")
    for step in unfinished(job):
        others = psutil.cpu_percent(1.0) / 100 if step.stage is Stage.BENCH else None
        started = time.monotonic()
        command = f"from {step.package}.start import main; main()"
        # -P: don't import a numpy.py from the working directory.
        ended = processes.run([sys.executable, "-P", "-c", command, *step.arguments])
        # verify exits with 1 for a verdict other than PASS, too.
        if ended.code != 0 and not (step.stage is Stage.VERIFY and ended.output):
            return Failure(step.stage, ended.reason)
        with staged_file(job.file(step.stage)) as partial:
            partial.write_bytes(ended.output)
        done = Done(_whole_key(job, step), time.monotonic() - started, others)
        _write_done(job, {**read_done(job), step.stage: done})
    return None


def unfinished(job: Job) -> list[Step]:
    """The stages that are not finished for these inputs; all of them if the export is not."""
    done = read_done(job)
    if Stage.EXPORT not in done or not _is_whole(job):
        return list(job.steps)
    left = [step for step in job.steps if not _is_done(job, step, done)]
    return list(job.steps) if any(step.stage is Stage.EXPORT for step in left) else left


def _is_done(job: Job, step: Step, done: Mapping[str, Done]) -> bool:
    known = done.get(step.stage)
    return (
        known is not None and known.key == _whole_key(job, step) and job.file(step.stage).exists()
    )


def read_done(job: Job) -> Mapping[str, Done]:
    """The finished stages. A damaged file counts as none."""
    try:
        return msgspec.json.decode((job.figures / _DONE).read_bytes(), type=dict[str, Done])
    except (OSError, msgspec.DecodeError):
        return {}


def forget(job: Job) -> None:
    """Have every stage done again."""
    (job.figures / _DONE).unlink(missing_ok=True)


def _write_done(job: Job, done: Mapping[str, Done]) -> None:
    with staged_file(job.figures / _DONE) as partial:
        partial.write_bytes(msgspec.json.encode(done))


def _unfit(job: Job) -> Failure | None:
    """Why this machine can't do the job; None if it can."""
    first = job.steps[0].stage if job.steps else Stage.EXPORT
    if job.token is not None and not (job.folder / job.token).exists():
        return Failure(
            first,
            f"{socket.gethostname()} does not see {job.folder}; choose an --output that all "
            "machines share",
        )
    if job.version != __version__:
        return Failure(
            first,
            f"{socket.gethostname()} has gemma-export {__version__}, expected {job.version}; "
            "install one version everywhere",
        )
    return None


def _is_whole(job: Job) -> bool:
    """Whether the bundle's files are there in their sizes. `verify` and others check digests."""
    try:
        manifest = read_manifest(job)
        sizes = {name: (job.bundle / name).stat().st_size for name in manifest.files}
    except (OSError, BundleError):
        return False
    return sizes == {name: file.bytes for name, file in manifest.files.items()}


def read_manifest(job: Job) -> Manifest:
    return Manifest.from_json((job.bundle / MANIFEST).read_bytes())


def _whole_key(job: Job, step: Step) -> str:
    """The step's key with the bundle's digest, and what else its figures depend on here."""
    told: list[object] = [step.key, sha256_file(job.bundle / MANIFEST)]
    if step.stage is not Stage.EXPORT:
        target = read_manifest(job).target
        packages = {*target.packages, *BACKENDS[target.name].computes_with, "gemma-export"}
        told.append({name: package_version(name) for name in sorted(packages)})
    if step.stage is Stage.BENCH:
        told.append((processor_name(), physical_cores()))
    return digest_of(told)
