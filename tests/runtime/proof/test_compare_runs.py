import json
import math
from pathlib import Path

import numpy as np
import pytest

from gemma_runtime.cli import run_command
from gemma_runtime.errors import EvaluationError
from gemma_runtime.proof.compare_runs import compare_runs
from gemma_runtime.proof.task_runs import open_task_run
from tests.runtime.proof.lm_eval_files import choice_sample, text_sample, write_run

Captured = pytest.CaptureFixture[str]


def test_a_comparison_counts_flips_changed_answers_and_probabilities(tmp_path: Path) -> None:
    """Right, wrong or changed from one wrong choice to another, over four questions."""
    before = [[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0], [-1.0, -2.0, -3.0]]
    after = [[-1.1, -2.0, -3.0], [-2.0, -1.0, -3.0], [-3.0, -2.0, -1.0], [-3.0, -1.0, -2.0]]
    targets = [0, 0, 0, 1]
    run_a, run_b = (
        write_run(
            tmp_path / name,
            {
                "mc": [
                    choice_sample(f"q{i}", x, t, t)
                    for i, (x, t) in enumerate(zip(xs, targets, strict=True))
                ]
            },
        )
        for name, xs in (("a", before), ("b", after))
    )

    (score,) = compare_runs(run_a, run_b).tasks

    figures = score.figures
    assert (score.task, score.metric, figures.questions, figures.clusters) == ("mc", "acc", 4, None)
    assert (figures.a, figures.b, figures.difference.difference) == (0.5, 0.5, 0)
    assert figures.flips == (1, 1)
    assert (figures.flipped, figures.mcnemar_p, figures.answers_changed) == (0.5, 1.0, 0.75)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in map(np.array, (before, after)))
    change = np.log(q / p)[np.arange(4), targets].mean()
    assert figures.log_p_right is not None
    assert figures.log_p_right.difference == pytest.approx(change)
    assert figures.choice_kl == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert figures.smallest_difference == pytest.approx(1.5)  # six flips of four questions


def test_questions_are_joined_by_digest_not_by_place(tmp_path: Path) -> None:
    """Equal questions are counted off, and those that one run lacks are named."""
    samples = [
        choice_sample(q, x, 0, 0) for q, x in (("q", [0, -1]), ("q", [-1, 0]), ("r", [0, -1]))
    ]
    run_a = write_run(tmp_path / "a", {"mc": samples, "other": samples})
    run_b = write_run(tmp_path / "b", {"mc": [samples[2], samples[0]]})

    comparison = compare_runs(run_a, run_b)

    assert comparison.tasks[0].figures.questions == 2
    assert comparison.tasks[0].figures.flips == (0, 0)
    assert comparison.only_a == {"mc": 1, "other": 3}
    assert comparison.only_b == {}


def test_subjects_widen_the_interval(tmp_path: Path) -> None:
    def run(name: str, right: bool, subjects: bool) -> Path:
        flip = [
            choice_sample(
                f"q{i}",
                [0, -1] if right or i >= 20 else [-1, 0],
                0,
                0,
                subject=f"s{i // 5}" if subjects else None,
            )
            for i in range(60)
        ]
        return write_run(tmp_path / f"{name}{subjects}", {"mc": flip})

    plain, clustered = (
        compare_runs(run("a", True, s), run("b", False, s)).tasks[0].figures for s in (False, True)
    )

    assert (plain.clusters, clustered.clusters) == (None, 12)
    assert plain.difference.difference == clustered.difference.difference == pytest.approx(-1 / 3)
    assert clustered.difference.low < plain.difference.low
    assert clustered.smallest_difference == pytest.approx(plain.smallest_difference * math.sqrt(5))


def test_a_group_pools_its_tasks_and_counts_them_as_clusters(
    tmp_path: Path, capsys: Captured
) -> None:
    groups = {"mmlu": ["mmlu_a", "mmlu_sub"], "mmlu_sub": ["mmlu_b"]}
    right, wrong = ([choice_sample(f"q{i}", x, 0, 0) for i in range(8)] for x in ([0, -1], [-1, 0]))
    run_a = write_run(tmp_path / "a", {"mmlu_a": right, "mmlu_b": wrong}, groups=groups)
    run_b = write_run(tmp_path / "b", {"mmlu_a": wrong, "mmlu_b": wrong}, groups=groups)

    pooled = {score.task: score.figures for score in compare_runs(run_a, run_b).groups}

    assert (pooled["mmlu"].questions, pooled["mmlu"].clusters) == (16, 2)
    assert pooled["mmlu"].flips == (8, 0)
    assert pooled["mmlu_sub"].questions == 8
    assert run_command(["compare", str(run_a), str(run_b)]) == 0
    assert "mmlu_a" not in capsys.readouterr().out
    assert run_command(["compare", str(run_a), str(run_b), "--all"]) == 0
    assert "mmlu_a" in capsys.readouterr().out


def test_generated_answers_are_compared_as_each_filter_reads_them(tmp_path: Path) -> None:
    strict = [text_sample(f"q{i}", "[invalid]", False, "strict") for i in range(3)]
    run_a = write_run(
        tmp_path / "a",
        {"gen": [*strict, *(text_sample(f"q{i}", "42", True, "flex") for i in range(3))]},
    )
    run_b = write_run(
        tmp_path / "b",
        {"gen": [*strict, *(text_sample(f"q{i}", str(40 + i), i == 2, "flex") for i in range(3))]},
    )

    flexible, strictly = (score.figures for score in compare_runs(run_a, run_b).tasks)

    assert flexible.flips == (2, 0)
    assert flexible.answers_changed == pytest.approx(2 / 3)
    assert (strictly.flips, strictly.answers_changed) == ((0, 0), 0)
    assert flexible.log_p_right is None
    assert flexible.choice_kl is None


def test_the_right_choice_can_be_named_by_its_text(tmp_path: Path) -> None:
    run_a, run_b = (
        write_run(tmp_path / name, {"mc": [choice_sample("q", x, "B", 1)]})
        for name, x in (("a", [-1.0, -1.0]), ("b", [-2.0, -1.0]))
    )

    figures = compare_runs(run_a, run_b).tasks[0].figures

    assert figures.log_p_right is not None
    assert figures.log_p_right.difference == pytest.approx(math.log(0.5 * (1 + math.exp(-1))) * -1)


def test_a_single_continuation_counts_with_its_own_likelihood(tmp_path: Path) -> None:
    """As in lambada, where the probability among one choice is always 1."""
    run_a, run_b = (
        write_run(tmp_path / name, {"mc": [choice_sample("q", [x], "A", 0)]})
        for name, x in (("a", -1.0), ("b", -1.5))
    )

    figures = compare_runs(run_a, run_b).tasks[0].figures

    assert figures.log_p_right is not None
    assert figures.log_p_right.difference == -0.5
    assert (figures.answers_changed, figures.choice_kl) == (None, None)


def test_noise_is_measured_against_the_run_of_the_same_bundle(tmp_path: Path) -> None:
    def run(name: str, bundle: str, x: list[float]) -> Path:
        return write_run(
            tmp_path / name,
            {"mc": [choice_sample("q", x, 0, 0)]},
            config={"bundle": bundle, "bundle_digest": bundle},
        )

    run_a, run_b = run("a", "float", [0, -1]), run("b", "int8", [-1, 0])

    of_b = compare_runs(run_a, run_b, run("c", "int8", [-1, 0]))
    of_a = compare_runs(run_a, run_b, run("d", "float", [-1, 0]))

    assert (of_b.noise, of_a.noise) == ("int8", "float")
    assert of_b.tasks[0].noise is not None
    assert of_b.tasks[0].noise.flips == (0, 0)
    assert of_a.tasks[0].noise is not None
    assert of_a.tasks[0].noise.flips == (1, 0)
    with pytest.raises(EvaluationError, match="is a run of int4, expected one more of int8 or of"):
        compare_runs(run_a, run_b, run("e", "int4", [0, -1]))


def test_different_prompts_are_refused(tmp_path: Path, capsys: Captured) -> None:
    runs = [
        write_run(tmp_path / name, {"mc": [choice_sample("q", [0, -1], 0, 0, prompt=name)]})
        for name in ("a", "b")
    ]

    assert run_command(["compare", *map(str, runs)]) == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert "mc: the runs asked the same question with different prompts" in line


def test_runs_without_a_common_question_are_refused(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, {"mc": [choice_sample(name, [0, -1], 0, 0)]}) for name in "ab"
    ]

    with pytest.raises(EvaluationError, match="no question in common"):
        compare_runs(*runs)


def test_tasks_without_a_score_per_question_are_named_or_refused(
    tmp_path: Path, capsys: Captured
) -> None:
    rolling = text_sample("q", "-12.5", False) | {
        "metrics": ["bits_per_byte"],
        "bits_per_byte": [1, 2],
    }
    alone = write_run(tmp_path / "alone", {"roll": [rolling]})
    both = write_run(tmp_path / "both", {"roll": [rolling], "gen": [text_sample("q", "1", True)]})

    with pytest.raises(EvaluationError, match="roll has no score for each question"):
        compare_runs(alone, alone)
    assert compare_runs(both, both).unscored == ("roll",)
    assert run_command(["compare", str(both), str(both)]) == 0
    assert "no score for each question: roll" in capsys.readouterr().out


def test_the_newest_run_in_the_only_subfolder_is_read(tmp_path: Path) -> None:
    for date in ("2026-11-28T00-00-00.1", "2026-11-29T00-00-00.1", "2025-12-01T00-00-00.1"):
        write_run(tmp_path / "out" / "model", {"gen": [text_sample("q", date, True)]}, date=date)

    run = open_task_run(tmp_path / "out")

    assert run.path.name == "results_2026-11-29T00-00-00.1.json"
    assert run.tasks["gen"][0].text == '["2026-11-29T00-00-00.1"]'
    assert open_task_run(run.path) == run
    write_run(tmp_path / "out" / "second", {"gen": [text_sample("q", "", True)]})
    with pytest.raises(EvaluationError, match="has runs of model, second; name one"):
        open_task_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results_1.json", None, "has no results_"),
        ("results_1.json", "{", "is not JSON"),
        ("results_1.json", '{"results": {}}', "is not lm_eval's: .*`config`"),
        (
            "samples_gen_1.jsonl",
            None,
            "has no answers to the questions of gen, expected samples_gen_1",
        ),
        ("samples_gen_1.jsonl", '{"doc": 1}', "line 1 of .* is not lm_eval's"),
        ("samples_gen_1.jsonl", "[" * 100_000, "line 1 of .* is not JSON"),
        (
            "samples_gen_1.jsonl",
            json.dumps(choice_sample("q", [0], 0, 0) | {"resps": [[["x", "False"]]]}),
            "line 1 of .* has a wrong likelihood",
        ),
    ],
)
def test_files_that_are_not_lm_evals_give_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = write_run(tmp_path / "run", {"gen": [text_sample("q", "", True)]}, date="1")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)

    with pytest.raises(EvaluationError, match=message) as caught:
        open_task_run(folder)
    assert "\n" not in str(caught.value)


def test_a_group_that_contains_itself_is_refused(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", {"gen": [text_sample("q", "", True)]}, groups={"a": ["b"], "b": ["a"]}
    )

    with pytest.raises(EvaluationError, match="contains itself"):
        open_task_run(run)


def test_the_command_prints_tables_and_json(tmp_path: Path, capsys: Captured) -> None:
    right, wrong = ([choice_sample(f"q{i}", x, 0, 0) for i in range(8)] for x in ([0, -1], [-1, 0]))
    run_a, run_b = (
        write_run(tmp_path / "a", {"mc": right}),
        write_run(tmp_path / "b", {"mc": wrong}),
    )

    assert run_command(["compare", str(run_a), str(run_b), "--noise", str(run_b)]) == 0

    table = capsys.readouterr().out
    assert "100.0% → 0.0%" in table
    assert "8, 0" in table
    assert "pretrained=b, twice" in table
    assert run_command(["compare", str(run_a), str(run_b), "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)["tasks"]
    assert score["figures"]["flips"] == [8, 0]
    assert score["figures"]["mcnemar_p"] == 2 / 2**8
