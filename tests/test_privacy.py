"""Files are written only in the documented places, and no library collects usage statistics."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from gemma_runtime.privacy import OPT_OUTS, opt_out

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny"
CACHE = "Library/Caches/gemma-export" if sys.platform == "darwin" else ".cache/gemma-export"
_CONFIG = {
    "model_type": "gemma2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "max_position_embeddings": 64,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def test_running_a_bundle_writes_no_file(tmp_path: Path) -> None:
    home = FreshHome(tmp_path)
    home.command("gemma_runtime", "verify", str(TINY))

    assert home.files() == []


def test_baking_writes_its_file_and_nothing_else(tmp_path: Path) -> None:
    home, system, file = FreshHome(tmp_path), tmp_path / "system.txt", tmp_path / "a.safetensors"
    system.write_text("Be brief.")
    home.command("gemma_runtime", "bake", str(TINY), str(file), "--system", str(system))
    home.command("gemma_runtime", "baked", str(TINY), str(file))

    assert home.files() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "home", system.name]


def test_a_user_can_turn_telemetry_back_on(tmp_path: Path) -> None:
    """Also shows that the test above can fail: onnxruntime then writes a file in the home."""
    home = FreshHome(tmp_path)
    home.command("gemma_runtime", "verify", str(TINY), environment=dict.fromkeys(OPT_OUTS, "0"))

    if not home.files():
        pytest.skip("NOT TESTED: the installed onnxruntime writes no telemetry file")
    assert any(path.endswith("deviceid") for path in home.files())


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_an_export_writes_only_its_bundle_and_its_cached_store(target: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    home = FreshHome(tmp_path)
    bundle = _export(home, target, tmp_path)

    kept = home.files()
    assert [Path(path).suffix for path in kept if not path.endswith(".lock")] == [".safetensors"]
    assert {str(Path(path).parent) for path in kept} == {f"{CACHE}/stores"}
    if target == "onnx":
        home.command("gemma_runtime", "verify", str(bundle))
        assert home.files() == kept


def test_the_cache_variable_moves_every_file_that_an_export_caches(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    home, cache = FreshHome(tmp_path), tmp_path / "cache"
    _export(home, "gguf", tmp_path, {"GEMMA_EXPORT_CACHE": str(cache)})

    assert home.files() == []
    assert len(list(cache.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("package", ["gemma_runtime", "gemma_export"])
def test_importing_a_package_opts_out_and_loads_no_library_that_collects(
    package: str, tmp_path: Path
) -> None:
    names = ["onnxruntime", "huggingface_hub", "transformers"]
    code = f"import json, os, sys, {package}; print(json.dumps([dict(os.environ), [*sys.modules]]))"
    environment, modules = json.loads(FreshHome(tmp_path).python(code))

    assert {name: environment[name] for name in OPT_OUTS} == OPT_OUTS
    assert [name for name in names if name in modules] == []


def test_a_telemetry_setting_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    opt_out()

    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


class FreshHome:
    """An empty home folder with an empty temporary folder in it.

    Processes get a minimal environment: `CI`, for example, turns onnxruntime's telemetry off.
    """

    def __init__(self, folder: Path) -> None:
        self._home = folder / "home"
        self._temporary = self._home / "tmp"
        self._temporary.mkdir(parents=True)

    def command(
        self, package: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Run a command line the way its console script does."""
        code = f"from {package}.cli import main; main()"
        self.python(code, *arguments, environment=environment)

    def python(
        self, code: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> str:
        """Run code in a fresh Python process; returns what it prints."""
        minimal = {
            "HOME": str(self._home),
            "TMPDIR": str(self._temporary),
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("export", "runtime")),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**minimal, **(environment or {})},
            cwd=self._home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def files(self) -> list[str]:
        """Every file below the home, as relative paths."""
        paths = (path for path in self._home.rglob("*") if path.is_file())
        return sorted(path.relative_to(self._home).as_posix() for path in paths)


def _export(
    home: FreshHome, target: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Path:
    config, output = folder / "config.json", folder / "bundle"
    config.write_text(json.dumps(_CONFIG))
    flags = ("--target", target, "--checkpoint", "random:1", "--config", str(config))
    sizes = ("--context", "64", "--prefill", "16", "--output", str(output))
    home.command("gemma_export", *flags, *sizes, environment=environment)
    return output
