"""Core AI models of tiny Gemma 4s in Apple's own runtime, compared with transformers."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gemma_runtime.bundle import Bundle
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint, dequantized, only
from tests.export.loud import check_every_way, save_loud_e2b
from tests.export.models import SHORT_DENSE, SHORT_E2B, WINDOW, eager_logits
from tests.export.rewinding import check_resumes, check_rewinds, cut

if find_spec("coreai") is None or find_spec("coreai_torch") is None:
    pytest.skip("coreai-core and coreai-torch are not installed", allow_module_level=True)

TOKENS = np.random.default_rng(4).integers(0, 96, 96).tolist()
# Tolerance in logits: this runtime sums float16 products in float16.
NEAR = 0.15

short = only(SHORT_E2B, SHORT_DENSE)


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", target="coreai", prefill=8)


@short
def test_every_way_to_feed_tokens_is_close_to_float32(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    check_every_way(float_bundle, tiny, TOKENS, NEAR)


@short
@pytest.mark.parametrize("quant", ["mixed"])
def test_quantized_bundles_give_the_logits_of_their_dequantized_weights(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    bundle = export(tiny.folder, quant, target="coreai", prefill=8)
    expected = eager_logits(dequantized(tiny, quant), TOKENS[:48]).numpy()
    with open_session(bundle) as session:
        figures = compare_logits(session.score(TOKENS[:48]), top_logits(expected, 96), NEAR)
    print(figures)
    assert figures.mean_kl <= 1e-4
    assert figures.top1 + figures.near_ties / figures.positions == 1
    assert verify_bundle(bundle).verdict is not Verdict.FAIL


@only(SHORT_E2B)
def test_a_session_goes_back_and_on_from_a_snapshot(float_bundle: Bundle) -> None:
    with open_session(float_bundle) as one, open_session(float_bundle) as other:
        assert check_rewinds(one, TOKENS, [4, WINDOW + 3], 20, mark=True) == [4, WINDOW + 3]
        check_resumes(one, other, cut(TOKENS[: 2 * WINDOW + 3], 7))


@pytest.mark.parametrize("place", ["product of the MLP", "residual"])
def test_what_overflows_float16_is_scaled_and_the_logits_stay_right(
    place: str, tmp_path: Path, export: Export
) -> None:
    loud = save_loud_e2b(place, tmp_path / "loud")
    bundle = export(loud.folder, "none", target="coreai", prefill=8)
    expected = eager_logits(loud.model, TOKENS[:24]).numpy()
    with open_session(bundle) as session:
        figures = compare_logits(session.score(TOKENS[:24]), top_logits(expected, 96), NEAR)
    print(place, figures)
    assert figures.mean_kl <= 1e-4
