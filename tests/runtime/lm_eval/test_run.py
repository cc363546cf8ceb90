"""lm_eval itself runs the committed bundle."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import gemma_runtime
from gemma_runtime.cli import run_command
from gemma_runtime.errors import EvaluationError
from gemma_runtime.lm_eval.answers import ANSWERS, Answer, AnswerFile
from gemma_runtime.lm_eval.run import ModelOptions, TaskOptions, run_tasks
from gemma_runtime.proof.compare_runs import compare_runs
from gemma_runtime.proof.task_runs import open_task_run
from tests.runtime.lm_eval.task_files import KINDS, write_tasks

datasets_config = pytest.importorskip("datasets.config", reason="the extra `eval` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and its packages' own
Captured = pytest.CaptureFixture[str]
TINY = Path(__file__).parents[2] / "data" / "tiny"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(autouse=True)
def _own_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    # It starts a dozen programs to describe the machine.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def _run(tasks: Path, output: Path, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    chunk = options.pop("chunk", 16)
    asked = TaskOptions(tasks=options.pop("names", ("letters",)), include=[tasks], **options)
    return run_tasks(TINY, asked, ModelOptions(threads=1, chunk=chunk), output, resume)


def test_the_command_writes_results_and_every_answer(
    tasks: Path, tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "run"
    arguments = ["--include", str(tasks), "--output", str(output), "--limit", "5", "--chunk", "16"]

    assert run_command(["lm-eval", str(TINY), "--tasks", ",".join(KINDS), *arguments]) == 0

    assert "|letters" in capsys.readouterr().out
    run = open_task_run(output)
    assert {name: len(answers) for name, answers in run.tasks.items()} == dict.fromkeys(KINDS, 5)
    assert run.model == "tiny"
    config = json.loads(run.path.read_text("utf-8"))["config"]
    assert config["target"] == "onnx"
    assert config["recipe"] == "int4"
    assert config["limit"] == 5
    assert config["chunk"] == 16
    assert set(config["runtime_versions"]) == {"gemma-export", "tokenizers", "onnxruntime"}
    assert len(config["bundle_digest"]) == len(config["codes_digest"]) == 64
    assert not (output / ANSWERS).exists()


def test_results_as_json(tasks: Path, capsys: Captured) -> None:
    arguments = ["--tasks", "letters", "--include", str(tasks), "--chunk", "16", "--json"]

    assert run_command(["lm-eval", str(TINY), *arguments]) == 0

    results = json.loads(capsys.readouterr().out)
    assert 0 <= results["results"]["letters"]["acc,none"] <= 1


def test_an_interrupted_run_goes_on_where_it_stopped(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends with the same answers, bit for bit."""
    names = ("letters", "texts", "replies", "rolling")
    whole = _run(tasks, tmp_path / "whole", names=names)
    add = AnswerFile.add
    added = 0

    def interrupt(self: AnswerFile, key: str, answer: Answer) -> None:
        nonlocal added
        added += 1
        if added == stop:
            raise KeyboardInterrupt
        add(self, key, answer)

    monkeypatch.setattr(AnswerFile, "add", interrupt)
    output = tmp_path / "parts"
    for stop in (20, 45):
        with pytest.raises(KeyboardInterrupt):
            _run(tasks, output, names=names, resume=stop > 20)
    with pytest.raises(EvaluationError, match="of an interrupted run; go on with --resume"):
        _run(tasks, output, names=names)
    stop, added = -1, 0

    resumed = _run(tasks, output, names=names, resume=True)

    assert resumed["results"] == whole["results"]
    assert 0 < added < 12 * (3 + 3 + 1 + 1) - 40
    parts, once = open_task_run(output), open_task_run(tmp_path / "whole")
    for name in names:
        for one, other in zip(parts.tasks[name], once.tasks[name], strict=True):
            assert one.text == other.text
            assert str(one.choices) == str(other.choices)
    assert not (output / ANSWERS).exists()


def test_runs_are_compared_with_their_noise(tasks: Path, tmp_path: Path) -> None:
    _run(tasks, tmp_path / "a")
    _run(tasks, tmp_path / "again")
    _run(tasks, tmp_path / "noise", chunk=2)

    comparison = compare_runs(tmp_path / "a", tmp_path / "again", tmp_path / "noise")

    (score,) = comparison.tasks
    assert (score.figures.questions, score.figures.clusters) == (12, 4)
    assert score.figures.choice_kl == 0
    assert score.noise is not None
    assert score.noise.choice_kl is not None
    assert score.noise.choice_kl > 0


def test_a_chat_is_rendered_by_the_bundle(tasks: Path, tmp_path: Path) -> None:
    names = ("letters", "replies")
    _run(tasks, tmp_path / "chat", names=names, chat_template=True, system="the", limit=2)

    (samples,) = (tmp_path / "chat").glob("samples_letters_*")
    sample = json.loads(samples.read_text("utf-8").splitlines()[0])
    prompt = sample["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<bos><start_of_turn>system\nthe<end_of_turn>\n")
    assert prompt.count("<start_of_turn>model\n") == 2  # a worked example, and the reply


def test_drawn_replies_depend_on_the_seed_only(tasks: Path, tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        options = f"do_sample=True,temperature=2.0,seed={seed}"
        output = tmp_path / str(number)
        _run(tasks, output, names=("replies",), gen_kwargs=options, limit=4)
        drawn.append([answer.text for answer in open_task_run(output).tasks["replies"]])

    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "letter"], "no task is named 'letter'; similar: letters"),
        (["--tasks", "letters", "--chunk", "15"], "expected an even number from 2 to 64"),
        (["--tasks", "letters", "--chunk", "32"], "the bundle takes at most 16 at once"),
        (["--tasks", "letters", "--resume"], "--resume needs the --output"),
        (["--tasks", "letters", "--output", "x.json"], "x.json is a file, expected a folder"),
        (["--tasks", "replies", "--gen-kwargs", "num_beams=4"], "can't generate with num_beams"),
        (["--tasks", "replies", "--gen-kwargs", "max_gen_toks=96"], "no room for a prompt"),
        (["--tasks", "broken"], "lm_eval can't load broken: "),
        (["--tasks", "lacking"], "can't load lacking: the module no_such_module is not installed"),
        (["--tasks", "coding"], "coding runs code that the model wrote"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_requests_give_one_line(
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    arguments: list[str],
    message: str,
) -> None:
    # Without the index of lm_eval's own tasks, which takes ten seconds.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager.__init__.__defaults__", (None, None, False, None)
    )
    monkeypatch.chdir(tmp_path)
    broken = json.loads((tasks / "letters.yaml").read_text()) | {"task": "broken"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "broken.yaml").write_text(
        json.dumps(broken | {"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}})
    )
    (tmp_path / "own" / "coding.yaml").write_text(
        json.dumps(broken | {"task": "coding", "unsafe_code": True})
    )
    (tmp_path / "own" / "lacking.yaml").write_text(
        "task: lacking\nprocess_results: !function scores.score\n"
    )
    (tmp_path / "own" / "scores.py").write_text("import no_such_module\n")
    include = ["--include", str(tasks), "--include", str(tmp_path / "own")]
    chunk = [] if "--chunk" in arguments else ["--chunk", "16"]

    assert run_command(["lm-eval", str(TINY), *arguments, *include, *chunk]) == 1

    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_task_whose_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """lm_eval's own IFEval imports packages that a plain install of lm_eval doesn't bring."""
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager.__init__.__defaults__", (None, None, False, None)
    )
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    folder = Path(str(metadata.distribution("lm_eval").locate_file("lm_eval/tasks/ifeval")))
    arguments = ["--tasks", "ifeval", "--include", str(folder), "--chunk", "16"]

    assert run_command(["lm-eval", str(TINY), *arguments]) == 1

    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "error: lm_eval can't load ifeval: langdetect is not installed; run: pip install "
        "'lm-eval[ifeval]'"
    )


def test_it_runs_without_torch_and_transformers(tasks: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(str(metadata.distribution("lm_eval").locate_file(""))).iterdir():
        if not path.name.startswith(("torch", "transformers")):
            (packages / path.name).symlink_to(path)
    own = Path(gemma_runtime.__file__).parents[1]
    code = (
        f"import sys; sys.path += [{str(own)!r}, {str(packages)!r}]\n"
        "from gemma_runtime.cli import run_command\n"
        "code = run_command(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    arguments = ["--tasks", "letters,replies", "--include", str(tasks), "--limit", "2"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, "lm-eval", str(TINY), *arguments, "--chunk", "16"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path)},
    )

    assert done.returncode == 0, done.stderr
    assert "letters" in done.stdout


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)

    with pytest.raises(Exception, match=r"run: pip install 'gemma-export\[eval\]'"):
        run_tasks(TINY, TaskOptions(tasks=["letters"]), ModelOptions())


def test_a_bundle_in_the_cache_of_the_hub_has_the_name_of_its_repository() -> None:
    from gemma_runtime.lm_eval.model import bundle_name

    assert bundle_name(Path("hub/models--owner--gemma-3/snapshots/0a1b2c")) == "owner/gemma-3"
    assert bundle_name(Path("out/gemma-3")) == "gemma-3"
