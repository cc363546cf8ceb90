"""Search files for tests, with the tiny model that they search."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_export.cli import run
from gemma_runtime.errors import GemmaError
from tests.export.gguf_files import GEMMA2, write_tiny

CONTEXT = 64
BENCH = {"repeats": 1, "new_tokens": 4, "threads": 1}
# Measured in an export alone: for searches that need no runtime.
BY_WEIGHTS = {"objectives": ["weights_kl", "size"], "context": CONTEXT}


def write_model(folder: Path) -> Path:
    """A tiny Gemma 2 with a tokenizer, and a text to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text"
    text.mkdir()
    (text / "en.txt").write_text("banana bananas an ana")
    (text / "de.txt").write_text("an ban bananas  a s")
    return write_tiny(folder, GEMMA2)


def write_search(folder: Path, **content: Any) -> Path:
    """A search file in a folder."""
    path = folder / "search.yaml"
    searched = {"checkpoints": "model.gguf", "targets": "onnx", **content}
    path.write_text(yaml.safe_dump(searched))
    return path


def search(
    file: Path, output: Path, capfd: pytest.CaptureFixture[str], *flags: str, code: int = 0
) -> dict[str, Any]:
    """Run a search with `--json`; returns what it prints."""
    assert run(["search", str(file), f"--output={output}", "--json", *flags]) == code
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def by_recipe(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a search with one target, by recipe."""
    return {cell["recipe"]: cell for cell in found["cells"]}


def refusal(file: Path) -> str:
    """The one line that refuses a file."""
    from gemma_export.search.question import ask

    with pytest.raises(GemmaError) as caught:
        ask(file)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix(f"{file}: ")
