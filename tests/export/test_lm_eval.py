"""A float32 bundle gives lm_eval the answers that lm_eval's own `hf` gives for the checkpoint."""

import copy
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from gemma_runtime.text.frame import CANONICAL_TEMPLATE
from tests.export.conftest import export_folder
from tests.export.models import GEMMA3, save_tiny
from tests.runtime.conftest import BOS, small_tokenizer
from tests.runtime.lm_eval.task_files import write_tasks

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and its packages' own
CONTEXT = 128
ROOT = Path(__file__).parents[2]

Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 with a tokenizer that writes bos, as Gemma's does."""
    folder = tmp_path_factory.mktemp("checkpoint")
    raw = small_tokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    config = copy.deepcopy(GEMMA3.config)
    config.vocab_size = raw.get_vocab_size()
    config.bos_token_id, config.eos_token_id = BOS, 1
    save_tiny(replace(GEMMA3, config=config), folder)
    raw.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    settings["chat_template"] = CANONICAL_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "bundle"
    return export_folder(checkpoint, "none", output, context=CONTEXT, prefill=32).directory


@pytest.fixture(scope="module")
def ours(bundle: Path) -> Iterator[Any]:
    from gemma_runtime.lm_eval import GemmaBundle

    model = GemmaBundle(bundle, threads=1)
    yield model
    model.close()


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_answers_are_those_of_hf(
    checkpoint: Path, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """Some prompts are longer than the context, and are cut at the same place."""
    theirs = _hf(checkpoint, add_bos_token=True)
    tasks = write_tasks(tmp_path / "tasks", questions=16, longest=70)
    names = ["letters", "texts", "replies"]

    expected, actual = (
        _samples(model, names, tasks, tmp_path, monkeypatch, chat) for model in (theirs, ours)
    )

    assert ours.get_model_info()["truncated_prompts"] > 0
    for name in names:
        _check_same(expected[name], actual[name])


def test_no_answer_to_mmlu_flips(
    checkpoint: Path, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions as people ask them: the synthetic ones have a few words and no punctuation."""
    theirs = _hf(checkpoint, add_bos_token=True)
    tasks, name = tmp_path / "tasks", "offline_mmlu_0shot"
    script = ROOT / "benchmarks/offline_tasks.py"
    subprocess.run([sys.executable, str(script), str(tasks)], check=True, capture_output=True)

    expected, actual = (
        _samples(model, [name], tasks, tmp_path, monkeypatch, limit=24)[name]
        for model in (theirs, ours)
    )

    assert len(expected) == 24
    assert {sample["acc"] for sample in expected} == {0.0, 1.0}
    _check_same(expected, actual)


def _check_same(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> None:
    for one, other in zip(expected, actual, strict=True):
        assert one["prompt_hash"] == other["prompt_hash"]
        if "acc" not in one:  # generated
            assert one["resps"] == other["resps"]
            continue
        assert one["acc"] == other["acc"]
        for (pair,), (own,) in zip(one["resps"], other["resps"], strict=True):
            assert own[0] == pytest.approx(pair[0], abs=2e-3)
            assert own[1] == pair[1]


def test_whole_texts_have_one_bos(
    checkpoint: Path, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf has one if its tokenizer writes none."""
    theirs = _hf(checkpoint, add_bos_token=False)
    tasks = write_tasks(tmp_path / "tasks", questions=6, longest=200)

    expected, actual = (
        _samples(model, ["rolling"], tasks, tmp_path, monkeypatch) for model in (theirs, ours)
    )

    for one, other in zip(expected["rolling"], actual["rolling"], strict=True):
        assert other["resps"][0][0] == pytest.approx(one["resps"][0][0], abs=2e-3)


@pytest.mark.parametrize("target", ["executorch", "coreml"])
def test_other_targets_give_the_same_answers(
    checkpoint: Path, ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Their caches go back less far, and their tokens are fed in other steps."""
    from gemma_runtime.lm_eval import GemmaBundle

    pytest.importorskip({"executorch": "executorch", "coreml": "coremltools"}[target])
    tasks = write_tasks(tmp_path / "tasks", questions=4, longest=40)
    other = export_folder(
        checkpoint, "none", tmp_path / "bundle", context=CONTEXT, prefill=16, target=target
    )
    model = GemmaBundle(other.directory, threads=1, chunk=16)

    expected, actual = (
        _samples(one, ["texts", "replies"], tasks, tmp_path, monkeypatch) for one in (ours, model)
    )
    model.close()

    for one, same in zip(expected["texts"], actual["texts"], strict=True):
        for (pair,), (own,) in zip(one["resps"], same["resps"], strict=True):
            assert own[0] == pytest.approx(pair[0], abs=0.05)  # Core ML computes in float16
    if target == "executorch":
        for one, same in zip(expected["replies"], actual["replies"], strict=True):
            assert one["resps"] == same["resps"]


def test_lm_eval_finds_the_model_by_its_name(bundle: Path) -> None:
    """By the entry point, from the release after 0.4.13 on; values come as texts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    named = project["project"]["entry-points"]["lm_eval.models"]["gemma_bundle"]
    entry = EntryPoint("gemma_bundle", named, "lm_eval.models")
    model = entry.load().create_from_arg_string(
        f"bundle={bundle},threads=1,exact=False,chunk=16", {"batch_size": 1, "device": None}
    )

    assert model.get_model_info()["chunk"] == 16
    assert model.get_model_info()["exact"] is False
    model.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"batch_size": 8}, "one sequence at a time"), ({"device": "cuda"}, "device is 'cuda'")],
)
def test_what_a_bundle_cannot_do_is_refused(
    bundle: Path, given: dict[str, Any], message: str
) -> None:
    from gemma_runtime.errors import EvaluationError
    from gemma_runtime.lm_eval import GemmaBundle

    with pytest.raises(EvaluationError, match=message):
        GemmaBundle(bundle, **given)


def _hf(checkpoint: Path, add_bos_token: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(checkpoint),
        device="cpu",
        dtype="float32",
        batch_size=1,
        max_length=CONTEXT,
        add_bos_token=add_bos_token,
    )


def _samples(
    model: Any,
    names: list[str],
    tasks: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    chat: bool = False,
    limit: int | None = None,
) -> Samples:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        limit=limit,
        apply_chat_template=chat,
    )
    samples: Samples = results["samples"]
    return samples
