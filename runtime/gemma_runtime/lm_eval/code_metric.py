"""The metric `code_eval`, by which lm_eval's coding tasks run what a model wrote.

lm_eval loads that metric from the hub, as a script, and it runs programs in a process that can do
everything the user can. Here each runs in a process of its own: see code_guard.py.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from gemma_runtime.errors import EvaluationError

_CPU_SECONDS = 3  # the limit of code_eval, there for the clock on the wall
_WALL_SECONDS = 30  # for programs that wait
_MEMORY_BYTES = 2 << 30
_TRIAL = ["def add(a,b): return a*b"]  # what lm_eval's tasks run when they are loaded


class CodeMetric:
    """Has the method that lm_eval's tasks call. Refuses programs unless they are `allowed`."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.isolation: str | None = None  # what kept the last program in, None before the first

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **unused: object,
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """pass@k of programs, each followed by its test; and whether each one passed."""
        if not self.allowed:
            if [*predictions[0]] == _TRIAL:
                return {}, {}
            raise EvaluationError(
                "the task runs code that the model wrote; allow it with --run-unsafe-code"
            )
        passed = {
            index: [self.passes(f"{program}\n{test}") for program in programs]
            for index, (test, programs) in enumerate(zip(references, predictions, strict=True))
        }
        fewest = min(map(len, passed.values()))
        return {f"pass@{n}": pass_at_k(passed.values(), n) for n in k if n <= fewest}, passed

    def passes(self, program: str) -> bool:
        """Whether a program runs to its end without an error, in time."""
        if sys.platform not in ("linux", "darwin"):
            raise EvaluationError(f"programs can't be isolated on {sys.platform}; use Linux")
        nonce = secrets.token_hex(16)
        with TemporaryDirectory() as folder:
            output = _run(f"{nonce}\n{program}".encode(errors="replace"), folder)
        isolation, _, answer = output.partition("\n")
        if not isolation:
            raise EvaluationError("the process for the model's code did not start")
        self.isolation = isolation
        return answer == nonce


def pass_at_k(passed: Any, k: int) -> float:
    """Mean chance that one of k programs passes: 1 - C(n - c, k) / C(n, k), arXiv 2107.03374."""
    chances = []
    for results in passed:
        n, right = len(results), sum(results)
        wrong = np.arange(n - right + 1, n + 1)
        chances.append(1.0 if n - right < k else 1 - float(np.prod(1 - k / wrong)))
    return float(np.mean(chances))


_METRIC = CodeMetric(allowed=False)  # one, as lm_eval's tasks keep what they have loaded


@contextmanager
def replaced_code_metric(allowed: bool) -> Iterator[CodeMetric]:
    """Within the block, lm_eval's tasks get this metric where they ask for `code_eval`."""
    import evaluate

    metric, load = _METRIC, evaluate.load
    metric.allowed, metric.isolation = allowed, None

    def replaced(path: str, *arguments: Any, **options: Any) -> Any:
        return metric if path == "code_eval" else load(path, *arguments, **options)

    evaluate.load = replaced
    try:
        yield metric
    finally:
        evaluate.load, metric.allowed = load, False


def _run(standard_input: bytes, folder: str) -> str:
    """What the guard prints; killed with all its children when time is up."""
    guard = Path(__file__).with_name("code_guard.py")
    command = [sys.executable, "-I", "-B", str(guard), str(_CPU_SECONDS), str(_MEMORY_BYTES)]
    environment = {"PATH": os.defpath, "HOME": folder, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(standard_input, _WALL_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return output.decode(errors="replace")
