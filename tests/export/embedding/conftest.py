"""Tiny encoders with a tokenizer, and their bundles."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import processors

from gemma_export.embedding.pipeline import EmbeddingResult
from gemma_export.pipeline import ExportRequest, export_model
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.embedding_bundle import EmbeddingBundle
from tests.export.embedding.encoders import EMBEDDING_GEMMA, ENCODERS, TinyEncoder
from tests.runtime.conftest import small_tokenizer


def save_with_tokenizer(encoder: TinyEncoder, folder: Path) -> Path:
    encoder.save(folder)
    # transformers ignores its flags, since tokenizer.json says what is around a text.
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    set_template(folder, "<bos> $A <eos>")
    return folder


def set_template(folder: Path, single: str) -> None:
    """Write the small tokenizer, which puts these tokens around a text."""
    tokenizer = small_tokenizer()
    special = [("<bos>", 2), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))


def export(folder: Path, recipe: str, output: Path, **options: object) -> EmbeddingBundle:
    request = ExportRequest(
        ("onnx",),
        find_recipe(recipe),
        str(folder),
        output=output,
        **options,  # type: ignore[arg-type]
    )
    (result,) = export_model(request)
    assert isinstance(result, EmbeddingResult)
    return result.bundle


@pytest.fixture(scope="session", params=ENCODERS, ids=lambda one: one.tiny.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(request.param, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EmbeddingGemma of the first generation."""
    return save_with_tokenizer(EMBEDDING_GEMMA, tmp_path_factory.mktemp("first"))


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """A copy that a test changes."""
    return Path(shutil.copytree(first, tmp_path / "model"))


@pytest.fixture(scope="session")
def bundle(first: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingBundle:
    return export(first, "int8", tmp_path_factory.mktemp("bundle") / "int8")
