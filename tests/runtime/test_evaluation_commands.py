import json
from pathlib import Path

import pytest

from gemma_runtime.bundle import Bundle
from gemma_runtime.cli import run_command
from tests.runtime.real_bundles import export_random

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    folder = tmp_path_factory.mktemp("safety")
    return export_random(folder / "export", tokenizer_path, context_length=128)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "bad.txt").write_text("the secret\nthe user\n")
    (tmp_path / "good.jsonl").write_text('{"prompt": "the ring"}\n{"prompt": "the king"}\n')
    return ["--prompts", str(tmp_path / "bad.txt"), "--harmless", str(tmp_path / "good.jsonl")]


def test_safety_prints_both_kinds_and_no_prompt(
    bundle: Bundle, files: list[str], capsys: Captured
) -> None:
    path = str(bundle.directory)
    assert run_command(["safety", path, path, *files, "--replies", "2"]) == 0
    out = capsys.readouterr().out
    for shown in ("2 harmful prompts", "2 harmless prompts", "change [95%]", "lower bounds"):
        assert shown in out
    assert "none: too few prompts" in out
    assert "Fewer than 30 prompts" in out
    assert "secret" not in out


def test_safety_as_json_has_every_prompt_by_its_id(
    bundle: Bundle, files: list[str], capsys: Captured
) -> None:
    assert run_command(["safety", str(bundle.directory), *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ids = [prompt["id"] for prompt in found["prompts"]]
    assert ids == ["bad.txt:1", "bad.txt:2", "good.jsonl:1", "good.jsonl:2"]
    assert found["harmful"]["refusals"] is None
    assert found["a"] == f"{bundle.directory} (exact graph)"
    assert "secret" not in json.dumps(found)


def test_safety_without_prompts_is_wrong_usage(bundle: Bundle, capsys: Captured) -> None:
    assert run_command(["safety", str(bundle.directory)]) == 2
    assert "give --prompts FILE, --harmless FILE or both" in capsys.readouterr().err


def test_a_missing_file_is_one_line(bundle: Bundle, capsys: Captured) -> None:
    assert run_command(["safety", str(bundle.directory), "--prompts", "nowhere.txt"]) == 1
    assert capsys.readouterr().err == "error: can't read nowhere.txt: No such file or directory\n"
