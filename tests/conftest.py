"""Settings for every test, and fixtures that several folders use."""

import pytest
from hypothesis import settings

from gemma_runtime.privacy import opt_out
from tests.distribution import ROOT, Distribution, build, find_distribution
from tests.shared import shared_folder

opt_out()  # some tests import onnxruntime or transformers before our packages
# No deadline: on a busy machine, a correct example may be slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The wheel and the sdist of this checkout, built once and shared by all workers."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    return find_distribution(
        shared_folder(tmp_path_factory, "distribution", lambda folder: build(ROOT, folder))
    )
