import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from gemma_runtime.bundle import MANIFEST, Bundle, describe_files
from gemma_runtime.cli import run_command
from gemma_runtime.manifest import Manifest
from gemma_runtime.proof.goldens import Golden, load_goldens, save_goldens
from gemma_runtime.text.byte_grammar import ByteGrammar
from gemma_runtime.text.generate import Generation, StopReason
from tests.runtime.conftest import small_tokenizer
from tests.runtime.manifests import write_bundle
from tests.runtime.real_bundles import export_random

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    return export_random(tmp_path_factory.mktemp("cli") / "export", tokenizer_path)


def _error(captured: Captured) -> str:
    """The error on stderr, which must be one line."""
    (line,) = captured.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", ["run", "chat", "verify", "bench", "inspect"])
def test_a_folder_that_is_not_a_bundle_gives_one_error_line(
    tmp_path: Path, capsys: Captured, command: str
) -> None:
    arguments = [command, str(tmp_path), *(["text"] if command == "run" else [])]

    assert run_command(arguments) == 1

    assert "is not a bundle" in _error(capsys)


@pytest.mark.parametrize("command", ["run", "chat"])
def test_drafts_are_refused_where_they_save_no_time(
    bundle: Bundle, tmp_path: Path, capsys: Captured, command: str
) -> None:
    shutil.copytree(bundle.directory, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["target"]["name"] = "executorch"
    path.write_text(json.dumps(manifest))

    arguments = [command, str(tmp_path / "copy"), *(["text"] if command == "run" else [])]
    assert run_command([*arguments, "--draft"]) == 1

    assert "one token per call, so drafts save no time" in _error(capsys)


def test_run_counts_the_steps_that_drafts_take(bundle: Bundle, capsys: Captured) -> None:
    arguments = ["run", str(bundle.directory), "the the the the", "--max-new-tokens", "16"]
    assert run_command([*arguments, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run_command([*arguments, "--json", "--draft"]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert drafted["text"] == plain["text"]
    assert drafted["steps"] <= plain["steps"] == plain["new_tokens"] - 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["verify"],
        ["run", "bundle"],
        ["verify", "bundle", "--threads", "0"],
        ["bench", "bundle", "--repeats", "none"],
        ["inspect", "bundle", "--loud"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(capsys: Captured, arguments: list[str]) -> None:
    assert run_command(arguments) == 2


@pytest.mark.parametrize("command", ["run", "chat", "verify", "bench", "inspect", "lm-eval"])
def test_every_command_has_help(capsys: Captured, command: str) -> None:
    """The default of --threads was parsed as markup and not shown."""
    assert run_command([command, "--help"]) == 0

    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "BUNDLE" in text
    assert "--json" in text
    assert ("[physical cores]" in text) is (command != "inspect")


def test_version_is_that_of_the_distribution(capsys: Captured) -> None:
    assert run_command(["--version"]) == 0

    assert capsys.readouterr().out == f"gemma-runtime {metadata.version('gemma-export')}\n"


def test_run_streams_text_to_stdout_and_speed_to_stderr(bundle: Bundle, capsys: Captured) -> None:
    assert _run(bundle, "the user", "--max-new-tokens", "6") == 0

    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert captured.out.strip()
    assert "tokens/s" in captured.err
    assert "ended by length" in captured.err


def test_run_as_json_prints_text_and_times(bundle: Bundle, capsys: Captured) -> None:
    assert _run(bundle, "the user", "--max-new-tokens", "6", "--json") == 0

    generation = json.loads(capsys.readouterr().out)
    assert set(generation) == set(Generation.__dataclass_fields__)
    assert (generation["prompt_tokens"], generation["new_tokens"]) == (4, 6)
    assert generation["reason"] == "length"


def test_run_draws_the_same_text_from_the_same_seed(bundle: Bundle, capsys: Captured) -> None:
    texts = [_text(bundle, capsys, "--temperature", "2", "--seed", seed) for seed in "112"]

    assert texts[0] == texts[1] != texts[2]


def test_run_applies_every_sampling_option(bundle: Bundle, capsys: Captured) -> None:
    greedy = _text(bundle, capsys)
    sampled = ("--temperature", "2", "--seed", "1")

    assert _text(bundle, capsys, *sampled) != greedy
    assert _text(bundle, capsys, *sampled, "--top-k", "1") == greedy
    assert _text(bundle, capsys, *sampled, "--top-p", "1e-6") == greedy
    assert _text(bundle, capsys, *sampled, "--min-p", "1") == greedy
    assert _text(bundle, capsys, "--repetition-penalty", "50") != greedy


def test_run_stops_before_a_stop_string(bundle: Bundle, capsys: Captured) -> None:
    full = _text(bundle, capsys)

    assert _text(bundle, capsys, "--stop", full[2:4]) == full[: full.index(full[2:4])]


def test_run_reads_its_prompt_from_stdin(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = _text(bundle, capsys)
    _type(monkeypatch, b"the user")

    assert _text(bundle, capsys, prompt="-") == direct


def test_run_refuses_stdin_that_is_not_utf_8(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It caused a traceback."""
    _type(monkeypatch, b"a\xffb")

    assert _run(bundle, "-") == 1

    assert "byte 1 of stdin is not UTF-8" in _error(capsys)


def test_run_applies_the_chat_template_only_with_chat(bundle: Bundle, capsys: Captured) -> None:
    def prompt_tokens(*options: str) -> int:
        assert _run(bundle, "the user", "--max-new-tokens", "1", "--json", *options) == 0
        return int(json.loads(capsys.readouterr().out)["prompt_tokens"])

    plain, turn = prompt_tokens(), prompt_tokens("--chat")

    assert plain < turn < prompt_tokens("--chat", "--system", "be in the ring")
    assert _run(bundle, "the user", "--system", "be brief") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "nan"], "top_p is nan"),
        (["--stop", ""], "stop string is empty"),
    ],
)
def test_run_refuses_invalid_sampling_options(
    bundle: Bundle, capsys: Captured, options: list[str], message: str
) -> None:
    assert _run(bundle, "the user", *options) == 1

    assert message in _error(capsys)


@pytest.mark.parametrize("command", ["run", "chat"])
def test_replies_keep_the_format_that_an_option_names(
    bundle: Bundle,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"const": 7}, "minItems": 2}')
    (tmp_path / "sum.gbnf").write_text('root ::= "1+" [23] "."')
    for options, pattern in (
        (["--json-schema", str(tmp_path / "schema.json")], r"\[7, 7(, 7)*\]?"),
        (["--grammar", str(tmp_path / "sum.gbnf")], r"1\+[23]\."),
        (["--regex", "[xyz]{3}"], "[xyz]{3}"),
        (["--choice", "the", "--choice", "us"], "the|us"),
    ):
        _type(monkeypatch, b"the\nus\n")
        given = ["the"] if command == "run" else []
        limit = ["--max-new-tokens", "9", "--json"]
        assert run_command([command, str(bundle.directory), *given, *limit, *options]) == 0
        replies = _replies(capsys)
        assert len(replies) == (1 if command == "run" else 2)
        for reply in replies:
            assert re.match(pattern, reply.text)
            assert reply.complete is bool(
                re.fullmatch(pattern, reply.text) and reply.text[-1] != "7"
            )


@pytest.mark.parametrize("command", ["run", "chat"])
def test_two_formats_or_a_wrong_one_are_refused(
    bundle: Bundle, capsys: Captured, command: str
) -> None:
    pytest.importorskip("llguidance")
    call = [command, str(bundle.directory), *(["the"] if command == "run" else [])]
    assert run_command([*call, "--regex", "a", "--choice", "b"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert run_command([*call, "--regex", "("]) == 1
    assert "unclosed group" in _error(capsys)


def test_a_schema_is_compiled_for_the_apps(tmp_path: Path, capsys: Captured) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["é", 1]}', "utf-8")
    assert run_command(["compile-schema", str(schema)]) == 0
    grammar = ByteGrammar(json.loads(capsys.readouterr().out))
    assert grammar.may_end(grammar.follow(grammar.start, '"é"'.encode()))
    for text, named in (
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"type": "integer", "minimum": 1}', "minimum"),
    ):
        schema.write_text(text)
        assert run_command(["compile-schema", str(schema)]) == 1
        assert named in _error(capsys)


def test_run_refuses_a_prompt_longer_than_the_context(bundle: Bundle, capsys: Captured) -> None:
    assert _run(bundle, "x" * 200) == 1

    assert "pass the context of 64" in _error(capsys)


def test_run_refuses_a_bundle_without_a_tokenizer(tmp_path: Path, capsys: Captured) -> None:
    assert run_command(["run", str(write_bundle(tmp_path / "bundle").directory), "text"]) == 1

    assert "has no tokenizer" in _error(capsys)


def test_chat_replies_to_each_line_until_quit(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    _type(monkeypatch, b"the\n\n/new\nthe\n/quit\nnever read\n")

    assert _chat(bundle) == 0

    first, again = _replies(capsys)
    assert (first.text, first.prompt_tokens) == (again.text, again.prompt_tokens)


def test_chat_takes_a_system_turn(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for options in ([], ["--system", "be in the ring"]):
        _type(monkeypatch, b"the\n")
        assert _chat(bundle, *options) == 0
        counts += [reply.prompt_tokens for reply in _replies(capsys)]

    assert counts[0] < counts[1]


def test_chat_takes_tools_and_refuses_results_of_no_call(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "the user"}]')
    tools = ["--tools", str(tmp_path / "tools.json")]
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["chat_template"] = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    (copy / "manifest.json").write_text(json.dumps(manifest))
    bundle = Bundle(copy, bundle.manifest)
    counts = []
    for options in (tools, []):
        _type(monkeypatch, b"the\n")
        assert _chat(bundle, *options) == 0
        counts += [reply.prompt_tokens for reply in _replies(capsys)]
    assert counts[0] > counts[1]

    for line, match in (
        (b"/results [1]", "the last reply calls 0 tools, but there are 1 results"),
        (b"/results {}", "/results expects a JSON list"),
        (b"/results", "/results is not followed by JSON"),
    ):
        _type(monkeypatch, b"the\n" + line + b"\n")
        assert _chat(bundle, *tools) == 1
        assert match in _error(capsys)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("guard")
    raw = small_tokenizer()
    raw.add_tokens(["Yes", "No"])
    raw.save(str(folder / "tokenizer.json"))
    return export_random(folder / "export", folder / "tokenizer.json", context_length=2048)


def test_chat_asks_the_guard_about_turns_and_replies(
    bundle: Bundle, guard: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = ("--guard", str(guard.directory), "--guard-threshold")
    _type(monkeypatch, b"the\n")
    assert _chat(bundle) == 0
    (free,) = _replies(capsys)

    _type(monkeypatch, b"the\n")
    assert _chat(bundle, *watched, "1") == 0
    (allowed,) = _replies(capsys)
    assert allowed.text == free.text

    _type(monkeypatch, b"the\nthe\n")
    assert _chat(bundle, *watched, "1e-9") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["withheld"] for line in lines] == ["prompt", "prompt"]
    assert len(lines[0]["policies"]) == 4

    _type(monkeypatch, b"the\n")
    assert run_command(["chat", str(bundle.directory), *watched, "1e-9"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("[the guard stopped this prompt: ")


def test_chat_fails_closed_if_the_guard_can_t_check_a_turn(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    _type(monkeypatch, b"the\n")
    assert _chat(bundle, "--guard", str(bundle.directory)) == 1
    assert "the guard's vocabulary has no 'Yes'" in _error(capsys)
    assert run_command(["chat", str(bundle.directory), "--guard-threshold", "0.3"]) == 2


def test_chat_samples_as_the_bundle_says_unless_options_say_otherwise(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Path(__file__).parents[1] / "data" / "tiny"  # its manifest has Gemma 3's values

    def text(*options: str) -> str:
        _type(monkeypatch, b"the\n")
        assert run_command(["chat", str(tiny), "--json", "--seed", "1", *options]) == 0
        (reply,) = _replies(capsys)
        return reply.text

    sampled = text()
    assert sampled == text("--temperature", "1", "--top-k", "64", "--top-p", "0.95")
    assert sampled != text("--temperature", "0") == text("--top-k", "1")


def test_chat_stops_before_a_given_text(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    _type(monkeypatch, b"the\n")
    assert _chat(bundle) == 0
    (whole,) = _replies(capsys)
    _type(monkeypatch, b"the\n")
    last = whole.text[-1]
    assert _chat(bundle, "--stop", last) == 0
    (reply,) = _replies(capsys)
    assert (reply.text, reply.reason) == (whole.text.partition(last)[0], StopReason.STOP_STRING)


def test_a_rolling_chat_says_that_it_forgets_and_goes_on(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    _type(monkeypatch, b"in the ring\n" * 6)
    assert _chat(bundle) == 1
    assert "the conversation has" in _error(capsys)
    _type(monkeypatch, b"in the ring\n" * 6)
    assert _chat(bundle, "--roll") == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 6
    assert "[the context is full: forgot the oldest 2 turns]" in output.err


def test_chat_ends_with_1_when_a_piped_turn_does_not_fit(
    bundle: Bundle, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    _type(monkeypatch, b"x" * 200 + b"\nthe\n")

    assert _chat(bundle) == 1

    assert "the conversation has" in _error(capsys)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no openpty on this system")
def test_chat_continues_when_a_typed_turn_does_not_fit(bundle: Bundle) -> None:
    """One long line ended the conversation."""
    terminal, stdin = os.openpty()
    process = _start(["chat", str(bundle.directory), "--max-new-tokens", "2", "--json"], stdin)
    os.close(stdin)
    os.write(terminal, b"x" * 200 + b"\nthe\n/quit\n")

    out, err = process.communicate(timeout=60)
    os.close(terminal)

    assert process.returncode == 0
    assert "error: the conversation has" in err
    assert '"new_tokens"' in out


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
@pytest.mark.serial
def test_ctrl_c_exits_with_130_and_prints_nothing(bundle: Bundle) -> None:
    process = _start(["chat", str(bundle.directory), "--max-new-tokens", "1"], subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write("the\n")
    process.stdin.flush()
    process.stderr.readline()  # the first reply's speed; chat now waits for input
    process.send_signal(signal.SIGINT)

    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")


def test_verify_passes_an_unchanged_export(bundle: Bundle, capsys: Captured) -> None:
    assert run_command(["verify", str(bundle.directory), "--threads", "1"]) == 0

    assert "PASS" in capsys.readouterr().out


def test_verify_fails_if_the_goldens_have_other_logits(
    bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    folder = _with_other_goldens(bundle, tmp_path / "bundle")

    assert run_command(["verify", str(folder), "--json"]) == 1

    captured = capsys.readouterr()
    verification = json.loads(captured.out)
    assert verification["verdict"] == "FAIL"
    assert any("mean KL of scoring" in failure for failure in verification["failures"])
    assert captured.err == ""


def test_verify_refuses_an_altered_artifact(
    bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    folder = Path(shutil.copytree(bundle.directory, tmp_path / "bundle"))
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"\0\0\0\0")

    assert run_command(["verify", str(folder)]) == 1

    assert "was altered" in _error(capsys)


def test_inspect_compares_several_bundles(bundle: Bundle, capsys: Captured) -> None:
    assert run_command(["inspect", str(bundle.directory), str(bundle.directory), "--json"]) == 0

    comparison = json.loads(capsys.readouterr().out)
    assert len(comparison["bundles"]) == 2
    assert (comparison["same_model"], comparison["same_codes"]) == (True, True)


def test_bench_measures_several_bundles(bundle: Bundle, capsys: Captured) -> None:
    options = ["--repeats", "1", "--new-tokens", "2", "--threads", "1", "--json"]

    assert run_command(["bench", str(bundle.directory), str(bundle.directory), *options]) == 0

    benchmark = json.loads(capsys.readouterr().out)
    assert (benchmark["threads"], benchmark["repeats"], len(benchmark["bundles"])) == (1, 1, 2)


def _run(bundle: Bundle, prompt: str, *options: str) -> int:
    return run_command(["run", str(bundle.directory), prompt, "--threads", "1", *options])


def _text(bundle: Bundle, capsys: Captured, *options: str, prompt: str = "the user") -> str:
    capsys.readouterr()
    assert _run(bundle, prompt, "--max-new-tokens", "12", "--json", *options) == 0
    return str(json.loads(capsys.readouterr().out)["text"])


def _chat(bundle: Bundle, *options: str) -> int:
    greedy = ["--temperature", "0", "--max-new-tokens", "3", "--json"]
    return run_command(["chat", str(bundle.directory), *greedy, *options])


def _replies(capsys: Captured) -> list[Generation]:
    lines = capsys.readouterr().out.splitlines()
    return [msgspec.json.decode(line, type=Generation) for line in lines]


def _type(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))


def _start(arguments: Sequence[str], stdin: int) -> "subprocess.Popen[str]":
    call = "import sys; from gemma_runtime.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", call, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _with_other_goldens(bundle: Bundle, folder: Path) -> Path:
    """A copy in which each golden has another prompt's logits, with right digests."""
    shutil.copytree(bundle.directory, folder)
    goldens = load_goldens(bundle.path("goldens"))
    shifted = [*goldens[1:], goldens[0]]
    save_goldens(
        folder / "goldens.json",
        [
            Golden(golden.name, golden.tokens, other.reference, other.quantized)
            for golden, other in zip(goldens, shifted, strict=True)
        ],
    )
    fields = json.loads((folder / MANIFEST).read_bytes())
    fields["files"] = {
        name: {"sha256": file.sha256, "bytes": file.bytes}
        for name, file in describe_files(folder).items()
    }
    (folder / MANIFEST).write_bytes(Manifest.from_json(json.dumps(fields).encode()).to_json())
    return folder
