"""A new target needs a folder and one line in each table: a fake target runs every command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_export.cli import run
from gemma_export.targets import TARGETS
from gemma_runtime.backend_table import BACKENDS
from gemma_runtime.cli import run_command
from tests.export.fake_target import BACKEND
from tests.export.models import GEMMA3, save_tiny

ROOT = Path(__file__).parents[3]
Captured = pytest.CaptureFixture[str]

# Registers the fake backend in the processes that `bench` starts; patches here don't reach them.
_SITE = """
from gemma_runtime.backend_table import BACKENDS
from tests.export.fake_target import BACKEND

BACKENDS["fake"] = BACKEND
"""


@pytest.fixture(autouse=True)
def _fake_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the line to each table, in this process and in those it starts."""
    monkeypatch.setitem(TARGETS, "fake", "tests.export.fake_target")
    monkeypatch.setitem(BACKENDS, "fake", BACKEND)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_SITE)
    paths = [str(tmp_path / "site"), str(ROOT), str(ROOT / "export"), str(ROOT / "runtime")]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))


def export(tmp_path: Path, *flags: str) -> Path:
    save_tiny(GEMMA3, tmp_path / "model")
    bundle = tmp_path / "bundle"
    source = ["--checkpoint", str(tmp_path / "model"), "--output", str(bundle)]
    layout = ["--context", "48", "--prefill", "16"]
    assert run(["--target", "fake", *source, *layout, "--json", *flags]) == 0
    return bundle


def test_the_plan_uses_the_target_s_own_costs(capsys: Captured) -> None:
    assert run(["--target", "fake,onnx", "--size", "270m", "--plan", "--json"]) == 0
    fake, onnx = json.loads(capsys.readouterr().out)
    assert fake["run"]["runtime"] == 3 << 20
    assert fake["artifact"]["ropes"] == fake["artifact"]["padding"] == 0
    assert fake["artifact"]["table"] == onnx["artifact"]["table"]


@pytest.mark.parametrize("precision", ["single", "half"])
def test_the_target_exports_verifies_and_profiles(
    tmp_path: Path, capsys: Captured, precision: str
) -> None:
    bundle = export(tmp_path, "--fake-precision", precision)
    with np.load(bundle / "model.npz") as file:
        assert file["model.norm.weight"].dtype == (np.float16 if precision == "half" else "f4")
    capsys.readouterr()
    assert run_command(["verify", str(bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["limits"]["max_mean_kl"] == 2e-3
    assert (report["lowering"]["mean_kl"] < 1e-9) is (precision == "single")
    assert run_command(["bench", str(bundle), "--profile", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(bundle)]["new_token"][0]["operator"] == "decoder"


def test_bench_and_inspect_accept_a_bundle_of_the_target(tmp_path: Path, capsys: Captured) -> None:
    bundle = export(tmp_path)
    capsys.readouterr()
    limits = ["--repeats", "1", "--new-tokens", "2", "--threads", "1"]
    assert run_command(["bench", str(bundle), *limits, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundles"][0]["target"] == "fake"
    assert run_command(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundles"][0]["manifest"]["target"]["name"] == "fake"


def test_the_help_lists_the_target_and_its_flag(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert "fake (a dictionary of matrices)" in text
    assert "--fake-precision" in text


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--target", "fake", "--fake-precision", "triple"], "--fake-precision is 'triple'"),
        (["--target", "onnx", "--fake-precision", "half"], "half is an option of --target fake"),
    ],
)
def test_the_target_s_flag_with_a_wrong_value_or_another_target_is_refused(
    capsys: Captured, flags: list[str], match: str
) -> None:
    assert run([*flags, "--size", "2b", "--plan"]) == 1
    assert match in capsys.readouterr().err


def test_the_error_for_a_missing_package_names_the_extra(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert run(["--target", "fake", "--size", "2b"]) == 1
    assert "numpy is not installed; run: pip install 'gemma-export[fake]'" in (
        capsys.readouterr().err
    )
