"""Import rules of the runtime, and its public names."""

import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

import pytest

import gemma_export
import gemma_runtime
from gemma_runtime.backend_table import BACKENDS as TABLE

# Only lm_eval imports it, by its entry point, or the command that has checked the extra `eval`.
NEEDS_EXTRA = "gemma_runtime.lm_eval.model"
MODULES = [
    module.name
    for module in pkgutil.walk_packages(gemma_runtime.__path__, "gemma_runtime.")
    if not module.ispkg and module.name != NEEDS_EXTRA
]
BACKENDS = [name for name in MODULES if name.startswith("gemma_runtime.backends.")]
EXPORTER = ["torch", "gemma_export", "onnx", "transformers", "huggingface_hub"]
RUNTIMES = ["onnxruntime", "executorch", "coremltools", "coreai", "llama_cpp"]

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


def test_every_runtime_module_imports_without_torch_and_without_the_exporter() -> None:
    loaded = _loaded_by(MODULES, absent=EXPORTER)

    assert "gemma_runtime" in loaded
    assert len(MODULES) > 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_importing_a_backend_does_not_import_its_library(backend: str) -> None:
    loaded = _loaded_by([backend], absent=[*EXPORTER, *RUNTIMES])

    assert "gemma_runtime" in loaded


def test_the_backend_of_every_target_is_among_those_tested() -> None:
    assert {backend.opener.partition(":")[0] for backend in TABLE.values()} <= set(BACKENDS)


def test_importing_the_package_loads_neither_backends_nor_the_command_line() -> None:
    loaded = _loaded_by(["gemma_runtime"], absent=[*RUNTIMES, "typer", "gemma_export"])

    assert "gemma_runtime" in loaded


def test_the_import_check_fails_for_a_module_that_needs_torch() -> None:
    """Shows that the tests above can fail."""
    with pytest.raises(subprocess.CalledProcessError):
        _loaded_by(["gemma_export.model.torch_ops"], absent=["torch"])


def test_the_public_names_of_the_runtime_are_these() -> None:
    assert sorted(gemma_runtime.__all__) == [
        "Agreement",
        "AttentionKind",
        "Baked",
        "BakedError",
        "Bundle",
        "BundleError",
        "Constraint",
        "ConstraintError",
        "ContentGuard",
        "ContextFull",
        "Conversation",
        "Embedder",
        "EmbeddingBundle",
        "FakeSession",
        "GemmaError",
        "Generation",
        "Golden",
        "Guard",
        "GuardedConversation",
        "JsonAnswer",
        "LayerCache",
        "Limits",
        "Manifest",
        "Mark",
        "Matcher",
        "Message",
        "MissingExtra",
        "Opening",
        "Policy",
        "SCHEMA_VERSION",
        "SHIELD_POLICIES",
        "Sampling",
        "Session",
        "SessionError",
        "Snapshot",
        "StopReason",
        "TextGeneration",
        "Tokenizer",
        "TokenizerError",
        "ToolCall",
        "TopLogits",
        "Verdict",
        "Verification",
        "Violation",
        "Withheld",
        "__version__",
        "ask_json",
        "bake",
        "compare_logits",
        "encode_chat",
        "feed",
        "generate",
        "generate_text",
        "load_goldens",
        "load_tokenizer",
        "open_baked",
        "open_bundle",
        "open_embedder",
        "open_embedding_bundle",
        "open_session",
        "read_tools",
        "verify",
        "verify_bundle",
    ]
    assert all(hasattr(gemma_runtime, name) for name in gemma_runtime.__all__)


def test_the_public_names_of_the_exporter_are_these() -> None:
    assert sorted(gemma_export.__all__) == [
        "ExportRequest",
        "ExportResult",
        "Plan",
        "Recipe",
        "__version__",
        "export_bundles",
        "export_model",
        "find_recipe",
        "load_recipe",
        "plan_exports",
    ]


def test_without_torch_the_exporter_offers_everything_but_exports_and_their_results() -> None:
    names = sorted(set(gemma_export.__all__) - {"ExportResult", "export_bundles", "export_model"})
    code = (
        "import sys; sys.modules['torch'] = None; import gemma_export as own; "
        f"print(*(name for name in own.__all__ if name in {names!r} and getattr(own, name)))\n"
        "try: own.export_bundles\n"
        "except own.MissingExtra as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    available, error = done.stdout.splitlines()
    assert sorted(available.split()) == names
    assert error == "torch is not installed; run: pip install 'gemma-export[export]'"


def test_both_packages_have_the_version_of_the_distribution() -> None:
    version = metadata.version("gemma-export")
    assert gemma_export.__version__ == gemma_runtime.__version__ == version


def _loaded_by(modules: Sequence[str], absent: Sequence[str]) -> set[str]:
    """The top-level packages loaded after a fresh process imported `modules`."""
    arguments = [",".join(absent), ",".join(modules)]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())
