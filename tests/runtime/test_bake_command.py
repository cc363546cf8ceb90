import io
import json
from pathlib import Path

import pytest

from gemma_runtime.bundle import Bundle
from gemma_runtime.cli import run_command
from tests.runtime.real_bundles import export_random

Captured = pytest.CaptureFixture[str]
SYSTEM = "the user is in the thing " * 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    """Of float32, so that the text doesn't depend on how its prompt is cut into chunks."""
    folder = tmp_path_factory.mktemp("bake") / "export"
    return export_random(folder, tokenizer_path, context_length=256)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    path = tmp_path / "system.txt"
    path.write_text(f"{SYSTEM}\n")
    return path


def bake(bundle: Bundle, file: Path, *options: object) -> None:
    assert run_command(["bake", str(bundle.directory), str(file), *map(str, options)]) == 0


def talk(bundle: Bundle, capsys: Captured, command: str, *arguments: object) -> dict[str, object]:
    """The JSON of a reply."""
    capsys.readouterr()
    given = [command, str(bundle.directory), *map(str, arguments), "--json"]
    assert run_command([*given, "--max-new-tokens", "8"]) == 0
    reply: dict[str, object] = json.loads(capsys.readouterr().out)
    return reply


def error(capsys: Captured) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_run_continues_a_baked_text(bundle: Bundle, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "text").write_text(SYSTEM)
    file = tmp_path / "text.safetensors"
    bake(bundle, file, "--text", tmp_path / "text")
    started = talk(bundle, capsys, "run", "in us", "--baked", file)
    whole = talk(bundle, capsys, "run", f"{SYSTEM}in us")
    assert started["text"] == whole["text"]
    assert started["prompt_tokens"] == 4
    assert isinstance(whole["prompt_tokens"], int)
    assert whole["prompt_tokens"] > 60


def test_run_answers_after_a_baked_system_turn(
    bundle: Bundle, tmp_path: Path, system: Path, capsys: Captured
) -> None:
    file = tmp_path / "chat.safetensors"
    bake(bundle, file, "--system", system)
    started = talk(bundle, capsys, "run", "in us", "--chat", "--baked", file)
    whole = talk(bundle, capsys, "run", "in us", "--chat", "--system", SYSTEM)
    assert started["text"] == whole["text"]
    assert started["prompt_tokens"] != whole["prompt_tokens"]


def test_chat_starts_and_starts_over_after_the_prefix(
    bundle: Bundle,
    tmp_path: Path,
    system: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = tmp_path / "examples.json"
    turns = [{"role": "user", "content": "in"}, {"role": "assistant", "content": "us"}]
    examples.write_text(json.dumps(turns))
    file = tmp_path / "chat.safetensors"
    bake(bundle, file, "--system", system, "--examples", examples)
    monkeypatch.setattr("sys.stdin", io.StringIO("in us\n/new\nin us\n"))
    capsys.readouterr()
    arguments = ["chat", str(bundle.directory), "--baked", str(file), "--temperature", "0"]
    assert run_command([*arguments, "--max-new-tokens", "6", "--json"]) == 0
    one, other = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one["text"] == other["text"]
    assert one["prompt_tokens"] == other["prompt_tokens"] < 20


def test_bake_tells_what_a_start_without_the_file_takes(
    bundle: Bundle, tmp_path: Path, system: Path, capsys: Captured
) -> None:
    file = tmp_path / "chat.safetensors"
    bake(bundle, file, "--system", system, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["file"], told["bytes"]) == (str(file), file.stat().st_size)
    assert told["tokens"] > 60
    assert told["feed_seconds"] > 0
    assert told["resume_seconds"] > 0
    bake(bundle, file, "--system", system, "--force")
    assert "feeding them takes" in capsys.readouterr().out


def test_baked_lists_files_and_fails_if_one_does_not_fit(
    bundle: Bundle, tmp_path: Path, system: Path, tokenizer_path: Path, capsys: Captured
) -> None:
    file, wrong = tmp_path / "chat.safetensors", tmp_path / "other.safetensors"
    bake(bundle, file, "--system", system)
    other = export_random(tmp_path / "other", tokenizer_path, context_length=256, seed=8)
    bake(other, wrong, "--system", system)
    capsys.readouterr()
    assert run_command(["baked", str(bundle.directory), str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"yes: {file}: ")
    assert run_command(["baked", str(bundle.directory), str(file), str(wrong), str(system)]) == 1
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in listed] == ["yes", "no", "no"]
    assert "of another bundle" in listed[1]
    assert run_command(["baked", str(bundle.directory), str(file), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["reason"]) == (True, None)
    assert found["begins"].startswith("the user is in the thing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "system.txt", "--system", "system.txt"], "--text"),
        ([], "--system, --examples, --tools or --text"),
    ],
)
def test_a_prefix_is_a_text_or_the_beginning_of_a_chat(
    bundle: Bundle, capsys: Captured, options: list[str], message: str
) -> None:
    assert run_command(["bake", str(bundle.directory), "x.safetensors", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_file_that_exists_is_not_replaced(bundle: Bundle, system: Path, capsys: Captured) -> None:
    arguments = ["bake", str(bundle.directory), str(system), "--system", str(system)]
    assert run_command(arguments) == 1
    assert "exists; give another file, or --force" in error(capsys)
    assert system.read_text() == f"{SYSTEM}\n"


def test_a_prefix_for_something_else_is_refused(
    bundle: Bundle, tmp_path: Path, system: Path, capsys: Captured
) -> None:
    chat, text = tmp_path / "chat.safetensors", tmp_path / "text.safetensors"
    bake(bundle, chat, "--system", system)
    bake(bundle, text, "--text", system)
    capsys.readouterr()
    folder = str(bundle.directory)
    assert run_command(["run", folder, "us", "--baked", str(chat)]) == 1
    assert "is the beginning of a chat; add --chat" in error(capsys)
    assert run_command(["run", folder, "us", "--chat", "--baked", str(text)]) == 1
    assert "is a text for prompts; leave --chat out" in error(capsys)
    assert run_command(["chat", folder, "--baked", str(text)]) == 1
    assert "not the beginning of a chat" in error(capsys)
    assert run_command(["chat", folder, "--baked", str(chat), "--system", "us"]) == 1
    assert "give none" in error(capsys)
    assert run_command(["run", folder, "", "--baked", str(text)]) == 0
    capsys.readouterr()
    given = ["run", folder, "us", "--chat", "--baked", str(chat), "--system", "us"]
    assert run_command(given) == 2


def test_a_file_that_is_not_there_is_one_line(bundle: Bundle, capsys: Captured) -> None:
    assert run_command(["chat", str(bundle.directory), "--baked", "nowhere.safetensors"]) == 1
    assert error(capsys) == "error: can't read nowhere.safetensors: No such file or directory"
