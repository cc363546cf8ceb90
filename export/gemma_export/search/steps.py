"""Turns a planned cell into a job: the command of each stage, and the digests of its inputs."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.device import kind_of
from gemma_export.digest import digest_of
from gemma_export.quantize.recipe import RECIPES, Recipe, write_recipe
from gemma_export.request import ExportRequest
from gemma_export.search.cells import Cell
from gemma_export.search.job import Job, Step
from gemma_export.search.measures import Stage
from gemma_export.search.question import Question
from gemma_export.search.schema import listed
from gemma_export.targets import target_spec
from gemma_runtime.bundle import sha256_file
from gemma_runtime.errors import SearchError
from gemma_runtime.machine import package_version

_VERSION = 1  # increase it when figures of the same inputs change
_RUNTIME, _EXPORT = "gemma_runtime", "gemma_export"


class Jobs:
    """Makes the jobs of one search. Opens each checkpoint once, for its digest."""

    def __init__(self, question: Question, folder: Path, token: str | None = None) -> None:
        self._question, self._folder, self._token = question, folder, token
        self._digest = cache(_checkpoint_digest)
        self._text = None if question.text is None else digest_path(question.text)
        self._tasks = [digest_path(path) for path in question.includes]

    @property
    def text_digest(self) -> str | None:
        return self._text

    def job(self, cell: Cell) -> Job:
        """Raises a GemmaError if the checkpoint can't be opened."""
        recipe = cell.request.recipe
        written = None if recipe is None or recipe in RECIPES.values() else write_recipe(recipe)
        empty = Job(cell.name, self._folder, (), written, self._token)
        makers = {
            Stage.EXPORT: self._export,
            Stage.VERIFY: self._verify,
            Stage.EVAL: self._eval,
            Stage.TASKS: self._run_tasks,
            Stage.BENCH: self._bench,
        }
        steps = [
            make(cell, empty) for stage, make in makers.items() if stage in self._question.stages
        ]
        return replace(empty, steps=tuple(steps))

    def _export(self, cell: Cell, job: Job) -> Step:
        request = cell.request
        named = request.recipe
        told = (
            _VERSION,
            self._digest(request.model),
            None if named is None else (named.rules, named.distilled),
            *(request.targets, request.bits, request.context_length, request.prefill_length),
            *(request.full_cache, request.cache, sorted(request.options.items())),
            kind_of(request.device),  # another kind of device gives other codes
            self._text,
            None if request.calibration is None else digest_path(request.calibration),
            _versions(cell.target),
        )
        arguments = (*export_flags(cell, job), "--force", "--json")
        return Step(Stage.EXPORT, _EXPORT, arguments, digest_of(told))

    def _verify(self, cell: Cell, job: Job) -> Step:
        return Step(Stage.VERIFY, _RUNTIME, ("verify", str(job.bundle), "--json"), "")

    def _eval(self, cell: Cell, job: Job) -> Step:
        return Step(Stage.EVAL, _RUNTIME, ("eval", str(job.bundle), "--json"), "")

    def _run_tasks(self, cell: Cell, job: Job) -> Step:
        tasks = self._question.tasks
        assert tasks is not None  # else the stage is not asked for
        flags = [*(f"--tasks={name}" for name in listed(tasks.names))]
        flags += [f"--include={path}" for path in self._question.includes]
        flags += [] if tasks.limit is None else [f"--limit={tasks.limit}"]
        flags += [] if tasks.num_fewshot is None else [f"--num-fewshot={tasks.num_fewshot}"]
        flags += ["--apply-chat-template"] if tasks.chat else []
        answers = self._folder / "answers" / cell.name
        arguments = (
            "lm-eval",
            str(job.bundle),
            *flags,
            f"--output={answers}",
            "--resume",
            "--json",
        )
        return Step(Stage.TASKS, _RUNTIME, arguments, digest_of((flags, self._tasks)))

    def _bench(self, cell: Cell, job: Job) -> Step:
        bench = self._question.bench
        flags = [f"--repeats={bench.repeats}", f"--new-tokens={bench.new_tokens}"]
        flags += [] if bench.threads is None else [f"--threads={bench.threads}"]
        arguments = ("bench", str(job.bundle), *flags, "--json")
        return Step(Stage.BENCH, _RUNTIME, arguments, digest_of(flags))


def export_flags(cell: Cell, job: Job) -> tuple[str, ...]:
    """The flags of `gemma-export` for a cell. As `--flag=value`, so that no value is a flag."""
    request = cell.request
    recipe = request.recipe
    flags: dict[str, object] = {
        "checkpoint": request.checkpoint,
        "size": request.size,
        "family": request.family,
        "base": request.base,
        "revision": request.revision,
        "config": request.config_file,
        "target": cell.target,
        "quant": "auto" if recipe is None else recipe.name if job.recipe is None else None,
        "recipe": None if job.recipe is None else job.recipe_file,
        "bits": request.bits,
        "calibration": request.calibration if _reads_text(request, recipe) else None,
        "context": request.context_length,
        "prefill": request.prefill_length,
        "cache": request.cache,
        "eval-text": request.eval_text,
        "max-ram": request.max_ram,
        "device": request.device,
        "max-vram": request.max_vram,
        "output": job.bundle,
    }
    named = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    named += [f"--adapter={adapter}" for adapter in request.adapters]
    own = target_spec(cell.target).options
    named += [
        f"{one.flag}={request.options[one.name]}" for one in own if one.name in request.options
    ]
    return (*named, *(["--full-cache"] if request.full_cache else []))


def _reads_text(request: ExportRequest, recipe: Recipe | None) -> bool:
    return recipe is None or request.reads_text(recipe)


def _checkpoint_digest(model: tuple[object, ...]) -> str:
    return open_checkpoint(*model).digest()  # type: ignore[arg-type]


def _versions(target: str) -> Mapping[str, str | None]:
    packages = {"gemma-export", "torch", *target_spec(target).packages.values()}
    return {name: package_version(name) for name in sorted(packages)}


def digest_path(path: Path) -> str:
    """The digest of a file, or of all files of a folder with their names."""
    try:
        if not path.is_dir():
            return sha256_file(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest_of([(file.relative_to(path).as_posix(), sha256_file(file)) for file in files])
    except OSError as error:
        raise SearchError(f"can't read {error.filename or path}: {error.strerror}") from error
