"""Calibrated recipes of Gemma 4 in every target: from text to a bundle that passes."""

import pytest

from gemma_runtime.proof.verify import Verdict, verify_bundle
from tests.export.conftest import Export, TinyCheckpoint, only
from tests.export.models import DENSE, E2B

pytestmark = only(E2B, DENSE)


@pytest.mark.parametrize(
    ("target", "recipe"),
    [
        ("onnx", "int8-smooth"),
        ("onnx", "int4-gptq"),
        ("executorch", "int8-channel-smooth"),
        ("executorch", "int4-table8-channel-gptq"),
        ("coreml", "int8-smooth"),
    ],
)
def test_a_calibrated_bundle_passes(
    tiny: TinyCheckpoint, export: Export, target: str, recipe: str
) -> None:
    prefill = 8 if target == "coreml" else 24
    bundle = export(tiny.folder, recipe, target=target, prefill=prefill)
    assert bundle.manifest.quantization.recipe == recipe
    verification = verify_bundle(bundle, threads=1)
    assert verification.verdict is Verdict.PASS, verification.failures
