"""Settings of every test, and what tests in different folders share."""

import pytest
from hypothesis import settings

from gemma_runtime.privacy import opt_out
from tests.distribution import ROOT, Distribution, build, find_distribution
from tests.shared import shared_folder

opt_out()  # also for tests that import onnxruntime or transformers first
# How long an example takes says how busy the machine is: none has a deadline.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The wheel and the sdist of this checkout, built once for all workers."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    return find_distribution(
        shared_folder(tmp_path_factory, "distribution", lambda folder: build(ROOT, folder))
    )
