"""A whole export: it writes one complete bundle or none, also if it fails or is killed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from gemma_export.cli import run
from gemma_export.memory import parse_bytes
from gemma_runtime.bundle import open_bundle
from gemma_runtime.errors import MemoryLimit
from gemma_runtime.proof.goldens import load_goldens
from gemma_runtime.proof.verify import Verdict, verify
from gemma_runtime.proof.worst_golden import worst_of_weights
from gemma_runtime.session import open_session
from tests.export.models import GEMMA2, GEMMA3, save_tiny

_CLI = [
    sys.executable,
    "-c",
    "import sys; from gemma_export.cli import run; sys.exit(run(sys.argv[1:]))",
]
_SLOW = {  # enough weights that a kill arrives during the export
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "vocab_size": 64000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(GEMMA3, folder)
    return folder


@pytest.fixture
def slow_config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_SLOW))
    return path


def failing(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Run the command line, which must exit with 1; returns its only error line."""
    assert run(list(flags)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_an_export_names_the_golden_that_lost_most(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean over all of them hides it."""
    flags = ["--checkpoint", str(folder), "--context", "64", "--quant", "int4"]
    assert run([*flags, "--output", str(tmp_path / "shown")]) == 0
    worst = worst_of_weights(open_bundle(tmp_path / "shown"))
    assert worst is not None
    shown = " ".join(capsys.readouterr().out.split())
    assert f"golden tokens {worst}; by language: gemma-runtime eval export" in shown
    assert run([*flags, "--output", str(tmp_path / "json"), "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary["worst_golden"]["name"] == worst.name


def test_an_exported_bundle_passes_verify_and_its_summary_is_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    flags = ["--checkpoint", str(folder), "--output", str(output), "--context", "64", "--json"]
    assert run(flags) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    bundle = open_bundle(output)
    assert summary["codes_digest"] == bundle.manifest.quantization.codes_digest
    assert summary["bits_per_weight"] == 8.5
    with open_session(bundle, threads=1) as session:
        assert verify(session, load_goldens(bundle.path("goldens"))).verdict is Verdict.PASS
    assert set(tmp_path.iterdir()) == {output}


def test_two_exports_of_one_checkpoint_are_identical(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(["--checkpoint", str(folder), "--output", str(tmp_path / name), "--json"]) == 0
    a, b = (open_bundle(tmp_path / name).manifest for name in ("a", "b"))
    assert a == b


def test_the_bundle_contains_the_tokenizer_template_and_end_of_turn_token(
    folder: Path, tmp_path: Path
) -> None:
    pieces = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "<end_of_turn>": 5}
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(folder / name)
    Tokenizer(models.BPE(pieces, [], unk_token="<unk>")).save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text("{{ bos_token }}")
    assert run(["--checkpoint", str(model), "--output", str(tmp_path / "out"), "--json"]) == 0
    bundle = open_bundle(tmp_path / "out")
    assert bundle.manifest.stop_tokens == (1, 5)
    assert bundle.manifest.chat_template == "{{ bos_token }}"
    assert bundle.path("tokenizer").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_an_existing_output_is_kept_unless_forced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--json"]
    assert run(flags) == 0
    before = (tmp_path / "out" / "manifest.json").stat().st_ino
    assert "exists; give another --output, or --force" in failing(capsys, *flags)
    assert (tmp_path / "out" / "manifest.json").stat().st_ino == before
    assert run([*flags, "--force"]) == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    kept = [*flags[:3], str(tmp_path / "notes"), "--force"]
    assert "is not a bundle" in failing(capsys, *kept)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--context", "100000"], "--context is 100000; this model supports 2 to 256 tokens"),
        (["--prefill", "999"], "--prefill is 999; expected 1 to "),
        (["--max-ram", "lots"], "'lots' is not an amount of memory"),
        (["--max-ram", "10MiB"], "--max-ram allows 10 MiB"),
        (["--recipe", "nowhere.yaml"], "can't read recipe nowhere.yaml"),
        (["--size", "2b"], "gemma2 2b has 26"),
    ],
)
def test_wrong_values_are_refused_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], match: str
) -> None:
    base = ["--checkpoint", str(folder), "--output", str(tmp_path / "out")]
    assert match in failing(capsys, *base, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--target", "onx"], "'onx' is unknown; choose from onnx"),
        (["--quant", "int44"], "'int44' is unknown; choose from int4"),
        (["--contxt", "3"], "No such option"),
    ],
)
def test_wrong_usage_exits_with_2_and_prints_the_choices(
    capfd: pytest.CaptureFixture[str], flags: list[str], match: str
) -> None:
    assert run(flags) == 2
    assert match in " ".join(capfd.readouterr().err.split())


@pytest.mark.serial
def test_a_killed_export_leaves_no_bundle_and_the_next_export_succeeds(
    tmp_path: Path, slow_config: Path
) -> None:
    output = tmp_path / "out" / "bundle"
    flags = [
        "--checkpoint",
        "random",
        "--config",
        str(slow_config),
        "--output",
        str(output),
        "--json",
    ]
    environment = {**os.environ, "GEMMA_EXPORT_CACHE": str(tmp_path / "cache")}
    stores = tmp_path / "cache" / "stores"
    killed = subprocess.Popen(_CLI + flags, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(stores.glob("*.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not output.exists()
    assert not any(stores.glob("*.safetensors"))
    subprocess.run(_CLI + flags, env=environment, check=True, stdout=subprocess.DEVNULL)
    open_bundle(output)
    assert not any(stores.glob("*.partial-*")), "partial files of the killed export are removed"


def test_a_full_disk_gives_a_one_line_error_and_leaves_no_file(
    tmp_path: Path, slow_config: Path
) -> None:
    """A limit on the file size replaces the full disk: writes fail in the same way."""
    output = tmp_path / "bundle"
    flags = ["--checkpoint", "random", "--config", str(slow_config), "--output", str(output)]
    environment = {**os.environ, "GEMMA_EXPORT_CACHE": str(tmp_path / "cache")}

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        _CLI + flags, env=environment, preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: can't write" in done.stderr
    assert not output.exists()
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix != ".lock"]


def test_a_plan_does_not_read_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(GEMMA2, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\xff" * 4000)  # reading these weights would fail: they are NaN
    assert run(["--checkpoint", str(tmp_path), "--plan", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["export_peak_bytes"] > 0
    assert run(["--size", "27b", "--plan"]) == 0
    assert "ring saves 0 MiB at this context" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GiB", 6 << 30), ("1.5g", 1_500_000_000), ("800 MB", 800_000_000), ("4096", 4096)],
)
def test_memory_limits_accept_the_usual_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["0", "9" * 400, "6 GiBs"])
def test_other_amounts_of_memory_are_refused(text: str) -> None:
    with pytest.raises(MemoryLimit, match="write it like 6GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("command", "completion"),
    [
        ("gemma-export --target exe", "executorch"),
        ("gemma-export --delegate vul", "vulkan"),
        ("gemma-export --quant int4-asym-d", "int4-asym-distilled"),
        ("gemma-export --family gemma", "gemma2"),
        ("gemma-export --si", "--size"),
    ],
)
def test_the_shell_completes_flags_and_their_values(command: str, completion: str) -> None:
    environment = {
        **os.environ,
        "_GEMMA_EXPORT_COMPLETE": "complete_zsh",
        "_TYPER_COMPLETE_ARGS": command,
    }
    done = subprocess.run(_CLI, env=environment, capture_output=True, text=True, check=True)
    assert completion in done.stdout
