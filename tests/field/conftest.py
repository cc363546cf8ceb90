"""A saved tiny Gemma, copied for each test that changes it."""

import os
import shutil
from pathlib import Path

import pytest

from tests.export.models import SHORT_GEMMA3, save_tiny
from tests.shared import shared_folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a cache apart from the user's."""
    os.environ["GEMMA_EXPORT_CACHE"] = str(shared_folder(tmp_path_factory, "cache"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("field")
    save_tiny(SHORT_GEMMA3, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))
