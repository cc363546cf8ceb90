"""Runs one system on one checkpoint:  python run.py JOB.json

It is started by its path in the system's own Python, and needs only what the system brings: no
package of ours but for our own systems. The answer goes into the file that the job names, part by
part, so that a part that fails leaves the others.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

Row = Sequence[float]


class Engine(Protocol):
    """A loaded model."""

    packages: Sequence[str]  # whose versions are reported
    gives_log_probabilities: bool  # instead of logits

    def score(self, tokens: list[int]) -> Sequence[Row]:
        """Logits after each token, computed in one call if the system can: (T, V)."""
        ...

    def start(self, tokens: list[int]) -> Row:
        """Forget everything, process the tokens; the logits after the last, (V,)."""
        ...

    def step(self, token: int) -> Row:
        """The logits after one more token, (V,)."""
        ...

    def chat(self, messages: list[dict[str, str]]) -> list[int] | int | None:
        """The tokens that the system makes of a chat, or their number; None if it can't tell."""
        ...


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answer: dict[str, Any] = {"errors": {}}
    engine: Engine | None = None

    def part(name: str, work: Callable[[], Any]) -> Any:
        try:
            answer[name] = work()
        except BaseException as error:
            answer["errors"][name] = _describe(error)
            traceback.print_exc()
        Path(job["answer"]).write_text(json.dumps(answer), "utf-8")

    def load() -> None:
        nonlocal engine
        sys.path.insert(0, str(Path(__file__).parent))
        engine = import_module(job["runner"]).open_engine(
            job["checkpoint"], job["scratch"], job["options"]
        )

    part("load", load)
    if engine is None:
        return
    tokens = job["tokens"]
    answer["versions"] = {name: _version(name) for name in engine.packages}
    answer["log_probabilities"] = engine.gives_log_probabilities
    part("prefill", lambda: _rows(engine.score(tokens)))
    part("decode", lambda: _steps(engine, tokens, job["first"]))
    part("greedy", lambda: _greedy(engine, tokens[: job["prompt"]], job["new"]))
    part("chat", lambda: engine.chat(job["messages"]))


def _steps(engine: Engine, tokens: list[int], first: int) -> list[list[float]]:
    """Logits from the last of the `first` tokens on, the others fed one at a time."""
    rows = [engine.start(tokens[:first]), *(engine.step(token) for token in tokens[first:])]
    return _rows(rows)


def _greedy(engine: Engine, prompt: list[int], new: int) -> list[int]:
    found: list[int] = []
    row = engine.start(prompt)
    while len(found) < new:
        values = [float(value) for value in row]
        found.append(values.index(max(values)))
        if len(found) < new:
            row = engine.step(found[-1])
    return found


def _rows(rows: Sequence[Row]) -> list[list[float]]:
    return [[float(value) for value in row] for row in rows]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _describe(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
