"""In which order cells are worked on, and how their figures are read and judged."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemma_export.search.figures import read_score
from gemma_export.search.job import Failure, Job
from gemma_export.search.judge import Result, State, judge
from gemma_export.search.measures import Figures, Stage
from gemma_export.search.question import Question, ask
from gemma_export.search.run import How, run_search
from gemma_export.search.schedule import Outcome
from gemma_runtime.errors import SearchError
from tests.export.search.searching import CONTEXT, write_model, write_search

RECIPES = ["int4", "int8", "none"]
FIGURES = Figures(bits_per_weight=4.5, size=1, weights_kl=0.1, kl=0.1, resident=1.0, decode=1.0)


class Recorded:
    """A scheduler that does nothing, and what it was asked to do, with what is measured."""

    def __init__(self, is_alone: bool) -> None:
        self.is_alone = is_alone
        self.events: list[str] = []

    def submit(self, jobs: Sequence[Job], memory: int) -> Future[Outcome]:
        assert memory > 0
        for job in jobs:
            assert Stage.BENCH not in [step.stage for step in job.steps]
        self.events += [f"prepare {_recipe(job)}" for job in jobs]
        future: Future[Outcome] = Future()
        future.set_result({job.cell: None for job in jobs})
        return future

    def measure(self, job: Job, processes: object) -> Failure | None:
        self.events.append(f"measure {_recipe(job)}")
        return None


def _recipe(job: Job) -> str:
    return job.cell.split("-")[1]


@pytest.mark.parametrize("is_alone", [True, False], ids=["one worker", "several"])
def test_nothing_is_measured_beside_another_cell(
    is_alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(is_alone)

    @contextmanager
    def opened(*asked: object) -> Iterator[Recorded]:
        yield recorded

    monkeypatch.setattr("gemma_export.search.run.open_scheduler", opened)
    monkeypatch.setattr("gemma_export.search.run.run_job", recorded.measure)
    monkeypatch.setattr("gemma_export.search.run.read_figures", lambda job, names: FIGURES)
    write_model(tmp_path)
    file = write_search(tmp_path, recipes=RECIPES, context=CONTEXT, text="text")
    told: list[str] = []
    found = run_search(ask(file), tmp_path / "out", How(), told.append, lambda *advanced: None)

    each = [(f"prepare {recipe}", f"measure {recipe}") for recipe in RECIPES]
    expected = [event for pair in each for event in pair] if is_alone else [
        *(prepare for prepare, _ in each), *(measure for _, measure in each)
    ]  # fmt: skip
    assert recorded.events == expected
    assert all(cell.is_measured for cell in found.cells)
    assert "opening model.gguf" in told


def test_the_score_is_the_mean_of_what_was_asked_for(tmp_path: Path) -> None:
    """Of a group not its tasks as well, and of a task the first metric of which more is better."""
    results: dict[str, dict[str, Any]] = {
        "group": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "group"},
        "group_a": {"acc,none": 0.25},
        "other": {"perplexity,none": 9.0, "exact_match,strict": 0.75},
    }
    better = {
        "group": {"acc": True},
        "group_a": {"acc": True},
        "other": {"perplexity": False, "exact_match": True},
    }
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps({"results": results, "higher_is_better": better}))
    assert read_score(file, ("group", "other")) == (0.5 + 0.75) / 2
    assert read_score(file, ("group_*",)) == pytest.approx((0.5 + 0.25 + 0.75) / 3)

    del better["other"]["exact_match"]
    file.write_text(json.dumps({"results": results, "higher_is_better": better}))
    with pytest.raises(SearchError, match="task other has no metric of which more is better"):
        read_score(file, ("other",))
    file.write_text("{}")
    with pytest.raises(SearchError, match="is not lm_eval's results"):
        read_score(file, ("other",))


def test_with_a_budget_the_best_first_objective_within_it_is_taken(tmp_path: Path) -> None:
    question = _question(tmp_path, budget={"resident": 100, "decode": 10})
    judged, why = judge(
        [
            _result("large", kl=0.01, resident=200.0, decode=50.0),
            _result("slow", kl=0.02, resident=90.0, decode=9.0),
            _result("good", kl=0.03, resident=90.0, decode=20.0),
            _result("fast", kl=0.2, resident=50.0, decode=40.0),
            _result("worse", kl=0.3, resident=60.0, decode=30.0),
            _result("broken", kl=0.0, resident=1.0, decode=99.0, verdict="FAIL"),
        ],
        question,
    )
    states = {one.name: one.state for one in judged}
    assert states == {
        "large": State.OVER,
        "slow": State.OVER,
        "good": State.TAKE,
        "fast": State.FRONT,
        "worse": State.DOMINATED,
        "broken": State.FAILED,
    }
    reasons = {one.name: one.reason for one in judged}
    assert reasons["slow"] == "decoding 9.0 tokens/s, at least 10.0 tokens/s asked for"
    assert reasons["large"] == "peak memory 200 B, at most 100 B asked for"
    assert reasons["worse"] == "fast is nowhere worse"
    assert why == reasons["good"]
    assert why == (
        "lowest KL to float32 0.0300 of 2 bundles on the front within the budget; peak memory 90 B "
        "of 100 B; decoding 20.0 tokens/s of 10.0 tokens/s"
    )


def test_if_nothing_keeps_to_the_budget_nothing_is_taken(tmp_path: Path) -> None:
    question = _question(tmp_path, budget={"kl": 0.001})
    judged, why = judge([_result("a", kl=0.5), _result("b", kl=0.002)], question)
    assert [one.state for one in judged] == [State.OVER, State.OVER]
    assert why == "no bundle to take: of 2 cells, 2 over budget"


def _question(folder: Path, **content: Any) -> Question:
    (folder / "text.txt").write_text("text")
    return ask(write_search(folder, recipes="int4", text="text.txt", **content))


def _result(name: str, **figures: Any) -> Result:
    known = {"kl": 0.1, "resident": 1.0, "decode": 100.0} | figures
    measured = Figures(bits_per_weight=4.5, size=1, weights_kl=0.1, **known)
    return Result(name, "model", "onnx", "int4", {}, State.PLANNED, figures=measured)
