"""Runs lm_eval's tasks on a bundle and writes the results as lm_eval does."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_runtime.bundle import read_manifest
from gemma_runtime.errors import EvaluationError, GemmaError, MissingExtra
from gemma_runtime.lm_eval.answers import ANSWERS
from gemma_runtime.lm_eval.shared import CHUNK, check_chunk
from gemma_runtime.manifest import DECODER, check_schema

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

MODEL = "gemma_bundle"
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What lm_eval's flags of the same names mean; None leaves it to the task."""

    tasks: Sequence[str]  # names or patterns such as mmlu_*
    include: Sequence[Path] = ()  # folders with task files
    limit: int | None = None  # questions per task
    num_fewshot: int | None = None
    chat_template: bool = False
    fewshot_as_multiturn: bool = True  # only with a chat template
    system: str | None = None
    gen_kwargs: str | None = None
    seed: int | None = None  # of everything; None takes lm_eval's own seeds
    run_unsafe_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    threads: int | None = None
    exact: bool = False
    chunk: int = CHUNK


def run_tasks(
    bundle: Path,
    options: TaskOptions,
    model_options: ModelOptions,
    output: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """lm_eval's results, without the samples. They and the samples go into the folder `output`.

    Answers are kept there until the end, and with `resume` used again. Raises MissingExtra without
    lm_eval, and EvaluationError if a task is unknown, can't be loaded, or runs code unallowed.
    """
    answers = None if output is None else output / ANSWERS
    _check_output(output, answers, resume)
    check_chunk(model_options.chunk)
    check_schema(read_manifest(bundle), DECODER)  # before lm_eval reads its ten thousand tasks
    _import_lm_eval()
    from lm_eval import simple_evaluate

    from gemma_runtime.lm_eval.code_metric import replaced_code_metric
    from gemma_runtime.lm_eval.model import GemmaBundle, bundle_name

    with replaced_code_metric(options.run_unsafe_code) as code:
        manager = _open_tasks(options)
        model = GemmaBundle(
            bundle,
            threads=model_options.threads,
            exact=model_options.exact,
            chunk=model_options.chunk,
            answers=answers,
        )
        try:
            results: dict[str, Any] = simple_evaluate(
                model=model,
                model_args={"model": bundle_name(bundle)},
                tasks=list(manager.loaded),
                task_manager=manager,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template and options.fewshot_as_multiturn,
                system_instruction=options.system,
                gen_kwargs=options.gen_kwargs,
                confirm_run_unsafe_code=options.run_unsafe_code,
                **({} if options.seed is None else dict.fromkeys(_SEEDS, options.seed)),
            )
        finally:
            model.close()
    results["config"] |= {"model": MODEL, "code_isolation": code.isolation}
    samples = results.pop("samples")
    if output is not None and answers is not None:
        _write(results, samples, output)
        answers.unlink(missing_ok=True)
    return results


def render_results(results: Mapping[str, Any]) -> str:
    """lm_eval's own tables."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(map(str, tables))


def _check_output(output: Path | None, answers: Path | None, resume: bool) -> None:
    if resume and output is None:
        raise EvaluationError("--resume needs the --output of the run that was interrupted")
    if output is not None and (output.suffix == ".json" or output.is_file()):
        raise EvaluationError(f"{output} is a file, expected a folder")
    if answers is not None and not resume and answers.exists():
        raise EvaluationError(
            f"{answers} has the answers of an interrupted run; go on with --resume, or delete it"
        )


def _import_lm_eval() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # lm_eval forks
    try:
        import_module("lm_eval.tasks")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "lm_eval", "eval") from error


def _open_tasks(options: TaskOptions) -> Any:
    """A task manager with the tasks asked for. The index of lm_eval's own takes ten seconds."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=[*options.include], include_defaults=False)
    if not options.include or any(name not in own.all_subtasks for name in options.tasks):
        own = TaskManager(include_path=[*options.include])
    names = _expand(options.tasks, own)
    return _Tasks(own, names, options)


def _expand(tasks: Sequence[str], manager: "TaskManager") -> list[str]:
    from lm_eval.utils import pattern_match

    names: list[str] = []
    for task in tasks:
        found = pattern_match([task], manager.all_tasks)
        if not found:
            similar = get_close_matches(task, manager.all_tasks, n=5)
            raise EvaluationError(
                f"no task is named {task!r}"
                + (f"; similar: {', '.join(similar)}" if similar else "")
                + "; give --include for a folder of your own"
            )
        names += found
    return [*dict.fromkeys(names)]


class _Tasks:
    """Loads the tasks once, and turns what goes wrong there into one line."""

    def __init__(self, manager: "TaskManager", names: Sequence[str], options: TaskOptions) -> None:
        self._manager = manager
        self.loaded = names
        self._tasks = _load(manager, names)
        for name, task in self._tasks["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not options.run_unsafe_code:
                raise EvaluationError(
                    f"{name} runs code that the model wrote; allow it with --run-unsafe-code"
                )

    def load(self, names: Sequence[str]) -> Any:
        return self._tasks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def _load(manager: "TaskManager", names: Sequence[str]) -> Any:
    try:
        return manager.load([*names])
    except GemmaError:
        raise
    except Exception as error:  # of datasets, the hub, or a task's own code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, ModuleNotFoundError) and error.name:
            reason = _missing(error.name)
        raise EvaluationError(f"lm_eval can't load {', '.join(names)}: {reason}") from error


def _missing(module: str) -> str:
    """Some tasks import packages that only one of lm_eval's own extras brings."""
    package = module.partition(".")[0]
    name = re.escape(package).replace("_", "[-_]")
    for line in metadata.requires("lm_eval") or ():
        if found := re.match(rf'{name}\b.*extra == "(.+)"', line):
            return f"{package} is not installed; run: pip install 'lm-eval[{found[1]}]'"
    return f"the module {package} is not installed; install the package that has it"


def _write(results: dict[str, Any], samples: Mapping[str, Any], output: Path) -> None:
    """lm_eval only logs what goes wrong here, so its files are read again."""
    from lm_eval.loggers import EvaluationTracker

    from gemma_runtime.proof.task_runs import open_task_run

    before = {*output.rglob("results_*.json")}
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.model_name = results["config"]["model_args"]["model"]
    tracker.general_config_tracker.model_name_sanitized = ""
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    (written,) = {*output.rglob("results_*.json")} - before or {output}
    run = open_task_run(written)
    if any(len(run.tasks[task]) != len(answers) for task, answers in samples.items()):
        raise EvaluationError(f"can't write all answers into {output}; is the disk full?")
