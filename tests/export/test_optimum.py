"""`optimum-cli export gemma`, discovered and started by optimum in a separate process."""

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
    """`find_spec` is not enough: our own file makes a namespace package `optimum`."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_optimum = pytest.mark.skipif(
    not _is_installed("optimum"),
    reason="NOT TESTED, optimum is not installed; run: pip install optimum",
)


def optimum_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it with this checkout's hook, which is added to the path only if not installed.

    Two copies would register the command twice.
    """
    code = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())"
    environment = dict(os.environ)
    if not _is_installed("gemma-export-optimum"):
        path = os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOK), path]))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_optimum
def test_optimum_lists_the_command() -> None:
    done = optimum_cli("export", "--help")
    assert done.returncode == 0, done.stderr
    assert "{gemma" in done.stdout or ",gemma" in done.stdout


@needs_optimum
def test_help_shows_the_flags_of_gemma_export() -> None:
    """argparse handled --help itself and listed none of the flags."""
    done = optimum_cli("export", "gemma", "--help")
    assert done.returncode == 0, done.stderr
    assert "--max-ram" in done.stdout


@needs_optimum
def test_the_command_exports_a_bundle(tmp_path: Path) -> None:
    save_tiny(GEMMA2, tmp_path / "model")
    bundle = tmp_path / "bundle"
    flags = ("--target", "onnx", "--checkpoint", str(tmp_path / "model"), "--output", str(bundle))
    done = optimum_cli("export", "gemma", *flags, "--context", "64", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["bundle"] == str(bundle)
    assert open_bundle(bundle).manifest.context_length == 64


@needs_optimum
def test_a_refused_request_prints_one_line_and_exits_with_1(tmp_path: Path) -> None:
    done = optimum_cli("export", "gemma", "--checkpoint", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@needs_optimum
@pytest.mark.parametrize("flags", [("--bogus",), ("--target", "nokia"), ("--context", "many")])
def test_wrong_usage_exits_with_2(flags: tuple[str, ...]) -> None:
    assert optimum_cli("export", "gemma", *flags).returncode == 2


def test_the_hook_is_the_only_file_in_the_namespace() -> None:
    """An `__init__.py` in any of the folders hides optimum's own modules."""
    files = set(HOOK.rglob("*.py"))
    assert files == {HOOK / "optimum" / "commands" / "register" / "register_gemma.py"}
