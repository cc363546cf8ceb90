"""What may import what, and what the public names are."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import gemma_runtime

RUNTIME = Path(gemma_runtime.__file__).parent
MODULES = [f"gemma_runtime.{path.stem}" for path in sorted(RUNTIME.glob("[!_]*.py"))]

_IMPORT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import importlib
for name in sys.argv[2].split(","):
    importlib.import_module(name)
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
print(*sorted(loaded))
"""


def test_the_runtime_imports_without_torch_and_the_exporter() -> None:
    loaded = _loaded_by(["gemma_runtime", *MODULES], absent=["torch", "gemma_export"])

    assert "gemma_runtime" in loaded
    assert "torch" not in loaded


def test_the_onnx_backend_imports_without_torch_and_the_exporter() -> None:
    loaded = _loaded_by(["gemma_runtime.backends.ort"], absent=["torch", "gemma_export", "onnx"])

    assert "onnxruntime" in loaded


def test_a_beta_is_not_imported_before_its_session_is_opened() -> None:
    loaded = _loaded_by(["gemma_runtime.backends.coreai"], absent=["torch", "gemma_export"])

    assert "gemma_runtime" in loaded
    assert "coreai" not in loaded


def test_no_backend_and_no_terminal_is_loaded_by_importing_the_package() -> None:
    loaded = _loaded_by(["gemma_runtime"], absent=["onnxruntime", "typer", "gemma_export"])

    assert "onnxruntime" not in loaded


def test_a_module_that_imports_torch_would_be_noticed() -> None:
    """The check itself: gemma_export needs torch."""
    with pytest.raises(subprocess.CalledProcessError):
        _loaded_by(["gemma_export.model.torch_ops"], absent=["torch"])


def test_the_public_names_are_these() -> None:
    assert sorted(gemma_runtime.__all__) == [
        "Agreement",
        "AttentionKind",
        "Bundle",
        "BundleError",
        "ContextFull",
        "Conversation",
        "FakeSession",
        "GemmaError",
        "Generation",
        "Golden",
        "LayerCache",
        "Limits",
        "Manifest",
        "Message",
        "MissingExtra",
        "SCHEMA_VERSION",
        "Sampling",
        "Session",
        "SessionError",
        "StopReason",
        "TextGeneration",
        "Tokenizer",
        "TokenizerError",
        "TopLogits",
        "Verdict",
        "Verification",
        "compare_logits",
        "encode_chat",
        "generate",
        "generate_text",
        "load_goldens",
        "load_tokenizer",
        "open_bundle",
        "open_session",
        "verify",
        "verify_bundle",
    ]
    assert all(hasattr(gemma_runtime, name) for name in gemma_runtime.__all__)


def _loaded_by(modules: Sequence[str], absent: Sequence[str]) -> set[str]:
    """The top-level packages loaded after importing `modules` in a fresh process."""
    arguments = [",".join(absent), ",".join(modules)]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())
