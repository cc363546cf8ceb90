"""The real Gemma 3 270M, exported to every target from one store."""

import numpy as np
import pytest

from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.bundle import Bundle
from gemma_runtime.generate import generate
from gemma_runtime.session import open_session
from gemma_runtime.tokenizer import load_tokenizer
from gemma_runtime.verify import Verdict, verify_bundle

pytestmark = pytest.mark.real

# XNNPACK rounds activations with one scale per token, onnxruntime in blocks of 32: both move logits
# by half of this on average.
TIE_MARGIN = 1.0
LONG = "The lighthouse keeper wrote every evening how far the light had reached. " * 50


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    pytest.importorskip("executorch")
    request = ExportRequest(
        targets=("onnx", "executorch"),
        recipe=find_recipe("int4"),
        checkpoint="demo",
        context_length=1024,
        prefill_length=128,
        output=tmp_path_factory.mktemp("real"),
        force=True,
    )
    results = export_bundles(request, QuietReporter())
    return {result.bundle.manifest.target.name: result.bundle for result in results}


def test_every_target_verifies_and_holds_the_same_codes(bundles: dict[str, Bundle]) -> None:
    assert {verify_bundle(bundle).verdict for bundle in bundles.values()} == {Verdict.PASS}
    assert len({b.manifest.quantization.codes_digest for b in bundles.values()}) == 1


def test_greedy_tokens_agree_between_targets_outside_near_ties(bundles: dict[str, Bundle]) -> None:
    prompt = [2, *load_tokenizer(bundles["onnx"]).encode("The history of the lighthouse")]
    with open_session(bundles["onnx"], exact=True) as session:
        tokens = list(generate(session, prompt, max_new_tokens=64))
        session.reset()
        exact = session.score([*prompt, *tokens])[len(prompt) - 1 : -1]  # (64, V)
    with open_session(bundles["executorch"]) as session:
        found = [session.prefill(prompt), *(session.decode(token) for token in tokens[:-1])]
    chosen = np.stack(found).argmax(-1)
    lead = exact.max(-1) - exact[np.arange(64), chosen]
    assert (lead <= TIE_MARGIN).all()
    assert (chosen == tokens).mean() > 0.85


def test_the_stock_runner_says_the_same_past_window_and_chunk(bundles: dict[str, Bundle]) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    bundle = bundles["executorch"]
    tokenizer = load_tokenizer(bundle)
    ids = [2, *tokenizer.encode(LONG + "In the end, he")]
    assert len(ids) > 512 + 128
    with open_session(bundle) as session:
        expected = tokenizer.decode(list(generate(session, ids, max_new_tokens=20)))
    model, texts = str(bundle.directory / "model.pte"), str(bundle.path("tokenizer"))
    said: list[str] = []
    config = GenerationConfig(echo=False, max_new_tokens=20, temperature=0.0, num_bos=1)
    TextLLMRunner(model, texts).generate(LONG + "In the end, he", config, said.append)
    assert expected.startswith("".join(said))
    assert len("".join(said)) > len(expected) // 2
