"""The real Gemma 3 270M, exported to three targets from the same store."""

import numpy as np
import pytest

from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.inspection import compare_bundles
from gemma_runtime.proof.goldens import load_goldens
from gemma_runtime.proof.verify import Verdict, measure_lowering, verify_bundle
from gemma_runtime.session import open_session
from gemma_runtime.text.generate import generate
from gemma_runtime.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.real

# In logits. XNNPACK quantizes activations with one scale per token, onnxruntime in blocks of 32;
# each changes the logits by half of this on average.
TIE_MARGIN = 1.0
LONG = "The lighthouse keeper wrote every evening how far the light had reached. " * 50


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    pytest.importorskip("executorch")
    pytest.importorskip("coremltools")
    request = ExportRequest(
        targets=("onnx", "executorch", "coreml"),
        recipe=find_recipe("int4"),
        checkpoint="demo",
        context_length=1024,
        prefill_length=128,
        output=tmp_path_factory.mktemp("real"),
        force=True,
    )
    results = export_bundles(request, QuietReporter())
    return {result.bundle.manifest.target.name: result.bundle for result in results}


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_the_bundle_passes_verify(bundles: dict[str, Bundle], target: str) -> None:
    assert verify_bundle(bundles[target]).verdict is Verdict.PASS


def test_core_ml_in_float16_is_close_to_the_reference_from_the_first_token(
    bundles: dict[str, Bundle],
) -> None:
    """Replays the shortest golden only: the interpreter needs almost a second per token."""
    golden = min(load_goldens(bundles["coreml"].path("goldens")), key=lambda g: len(g.tokens))
    with open_session(bundles["coreml"]) as session:
        assert measure_lowering(session, [golden]).mean_kl < 1e-4


def test_all_bundles_contain_the_same_codes(bundles: dict[str, Bundle]) -> None:
    digests = {inspection.codes_held for inspection in compare_bundles([*bundles.values()]).bundles}
    assert digests == {bundles["onnx"].manifest.quantization.codes_digest}


@pytest.mark.parametrize("target", ["executorch", "coreml"])
def test_greedy_tokens_agree_between_targets_except_at_near_ties(
    bundles: dict[str, Bundle], target: str
) -> None:
    prompt = [2, *load_tokenizer(bundles["onnx"]).encode("The history of the lighthouse")]
    with open_session(bundles["onnx"], exact=True) as session:
        tokens = list(generate(session, prompt, max_new_tokens=64))
        session.reset()
        exact = session.score([*prompt, *tokens])[len(prompt) - 1 : -1]  # (64, V)
    with open_session(bundles[target]) as session:
        rows = [session.prefill(prompt), *(session.decode(token) for token in tokens[:-1])]
    chosen = np.stack(rows).argmax(-1)
    lead = exact.max(-1) - exact[np.arange(64), chosen]
    assert (lead <= TIE_MARGIN).all()
    assert (chosen == tokens).mean() > 0.85


def test_onnxruntime_genai_generates_the_same_tokens_beyond_the_window(
    bundles: dict[str, Bundle],
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    bundle = bundles["onnx"]
    tokenizer = load_tokenizer(bundle)
    ids = tokenizer.encode(LONG + "In the end, he")
    model = og.Model(str(bundle.directory))
    assert [int(token) for token in og.Tokenizer(model).encode(tokenizer.decode(ids))] == ids
    prompt = [2, *ids]
    assert len(prompt) > 512 + 128
    with open_session(bundle) as session:
        expected = list(generate(session, prompt, max_new_tokens=20))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(np.array(prompt, np.int32))
    for _ in expected:
        generator.generate_next_token()
    assert [int(token) for token in generator.get_sequence(0)[len(prompt) :]] == expected


def test_executorch_s_own_runner_generates_the_same_text_beyond_window_and_chunk(
    bundles: dict[str, Bundle],
) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    bundle = bundles["executorch"]
    tokenizer = load_tokenizer(bundle)
    ids = [2, *tokenizer.encode(LONG + "In the end, he")]
    assert len(ids) > 512 + 128
    with open_session(bundle) as session:
        expected = tokenizer.decode(list(generate(session, ids, max_new_tokens=20)))
    model, vocabulary = str(bundle.directory / "model.pte"), str(bundle.path("tokenizer"))
    pieces: list[str] = []
    config = GenerationConfig(echo=False, max_new_tokens=20, temperature=0.0, num_bos=1)
    TextLLMRunner(model, vocabulary).generate(LONG + "In the end, he", config, pieces.append)
    assert expected.startswith("".join(pieces))
    assert len("".join(pieces)) > len(expected) // 2
