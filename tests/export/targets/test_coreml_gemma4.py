"""Core ML packages of tiny Gemma 4s in our interpreter: shared caches, per-layer embeddings."""

from pathlib import Path

import numpy as np
import pytest

from gemma_runtime.bundle import Bundle
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint, only
from tests.export.models import E2B, GEMMA4S, eager_logits

LONG = np.random.default_rng(4).integers(0, 96, 120).tolist()

every = only(*GEMMA4S)


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", target="coreml", prefill=8)


@every
def test_x(tiny: TinyCheckpoint, float_bundle: Bundle) -> None:
    expected = eager_logits(tiny.model, LONG).numpy()
    with open_session(float_bundle) as session:
        found = session.score(LONG[:70])
        print(np.abs(found - expected[:70]).max(), np.abs(expected).max())
        assert np.abs(found - expected[:70]).max() < 0.05
