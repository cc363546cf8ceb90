"""`optimum-cli export gemma`, as optimum itself finds and starts it, in its own process."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gemma_runtime.bundle import open_bundle
from tests.export.models import GEMMA2, save_tiny

HOOK = Path(__file__).parents[2] / "optimum_hook"


def _is_installed(name: str) -> bool:
    """`find_spec` alone is not enough: our own file makes a namespace package `optimum`."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_optimum = pytest.mark.skipif(
    not _is_installed("optimum"),
    reason="optimum is not installed: `optimum-cli export gemma` was NOT tested; run: "
    "pip install optimum",
)


def optimum_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it with this checkout's hook, installed or not; two copies would register it twice."""
    code = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())"
    environment = dict(os.environ)
    if not _is_installed("gemma-export-optimum"):
        path = os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOK), path]))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_optimum
def test_export_lists_gemma_once() -> None:
    done = optimum_cli("export", "--help")
    assert done.returncode == 0, done.stderr
    assert "{gemma" in done.stdout or ",gemma" in done.stdout


@needs_optimum
def test_help_is_that_of_gemma_export() -> None:
    """argparse answered --help itself, and knew of no flag."""
    done = optimum_cli("export", "gemma", "--help")
    assert done.returncode == 0, done.stderr
    assert "--max-ram" in done.stdout


@needs_optimum
def test_a_bundle_is_exported(tmp_path: Path) -> None:
    save_tiny(GEMMA2, tmp_path / "model")
    bundle = tmp_path / "bundle"
    flags = ("--target", "onnx", "--checkpoint", str(tmp_path / "model"), "--output", str(bundle))
    done = optimum_cli("export", "gemma", *flags, "--context", "64", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["bundle"] == str(bundle)
    assert open_bundle(bundle).manifest.context_length == 64


@needs_optimum
def test_a_refusal_is_one_line_and_code_1(tmp_path: Path) -> None:
    done = optimum_cli("export", "gemma", "--checkpoint", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@needs_optimum
@pytest.mark.parametrize("flags", [("--bogus",), ("--target", "nokia"), ("--context", "many")])
def test_wrong_usage_is_code_2(flags: tuple[str, ...]) -> None:
    assert optimum_cli("export", "gemma", *flags).returncode == 2


def test_nothing_but_the_command_is_added_to_the_namespace() -> None:
    """An `__init__.py` anywhere on the way hides optimum's own modules."""
    files = set(HOOK.rglob("*.py"))
    assert files == {HOOK / "optimum" / "commands" / "register" / "register_gemma.py"}
