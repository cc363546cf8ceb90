"""A saved tiny Gemma, copied for each test that changes it."""

import shutil
from pathlib import Path

import pytest

from tests.export.models import SHORT_GEMMA3, save_tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("field")
    save_tiny(SHORT_GEMMA3, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))
