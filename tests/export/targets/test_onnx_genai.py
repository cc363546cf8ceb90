"""ONNX bundles in onnxruntime-genai, compared with transformers and with our own runtime."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from gemma_export.targets.onnx.genai import CONFIG, GENAI
from gemma_export.targets.onnx.target import MODEL
from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.session import open_session
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.generate import generate
from gemma_runtime.text.tokenizer import load_tokenizer
from tests.data.tiny_bundle import build
from tests.export.conftest import Export, TinyCheckpoint, only
from tests.export.models import TINIES, UNNORMED, WINDOW, eager_logits

og = pytest.importorskip(
    "onnxruntime_genai",
    reason="NOT TESTED in onnxruntime-genai; run: pip install onnxruntime-genai",
)

TOKENS = np.random.default_rng(2).integers(0, 96, 200).tolist()
CONTEXT = 200


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", context=CONTEXT)


@pytest.fixture(scope="module")
def int4_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "int4", context=CONTEXT)


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a tokenizer, a chat template and sampling values."""
    return build(tmp_path_factory.mktemp("text") / "bundle")


class Generator:
    """onnxruntime-genai's generator, with our tokens."""

    def __init__(self, bundle: Bundle, **options: float) -> None:
        model = og.Model(str(bundle.directory))
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(**{"do_sample": False, **options})
        self.raw = og.Generator(model, parameters)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits of the last token, (V)."""
        self.raw.append_tokens(np.array(tokens, np.int32))
        return np.array(self.raw.get_logits(), np.float32).reshape(-1)

    def generate(self, count: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < count and not self.raw.is_done():
            self.raw.generate_next_token()
            tokens.append(int(self.raw.get_next_tokens()[0]))
        return tokens


def chunked(generator: Generator, chunks: Sequence[int]) -> NDArray[np.float32]:
    """The logits after each chunk of TOKENS: (chunks, V)."""
    ends = np.cumsum(chunks)
    return np.stack(
        [generator.prefill(TOKENS[e - c : e]) for e, c in zip(ends, chunks, strict=True)]
    )


@only(*TINIES, *UNNORMED)
@pytest.mark.parametrize(
    "chunks",
    [
        [WINDOW - 1, 1, 1, 1],
        [24 * 7 + 3],  # split at the config's chunk_size
        [7] * 20,
        [WINDOW, WINDOW + 1, 1, 1, 90, 1, 24, 3],
        [1] * 100,
    ],
    ids=str,
)
def test_chunks_that_cross_the_window_are_exact(
    tiny: TinyCheckpoint, float_bundle: Bundle, chunks: list[int]
) -> None:
    """Also crosses the end of the local caches, where GroupQueryAttention drops old rows."""
    expected = eager_logits(tiny.model, TOKENS[: sum(chunks)]).numpy()[np.cumsum(chunks) - 1]
    assert np.abs(chunked(Generator(float_bundle), chunks) - expected).max() <= 1e-4


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_a_quantized_bundle_generates_the_tokens_of_our_runtime(
    tiny: TinyCheckpoint, export: Export, cache: str
) -> None:
    bundle = export(tiny.folder, "int4", context=CONTEXT, cache=cache)
    prompt = TOKENS[: 3 * WINDOW + 5]
    with open_session(bundle, threads=1) as session:
        logits = session.prefill(prompt)
        session.reset()
        expected = list(generate(session, prompt, max_new_tokens=100))
    generator = Generator(bundle)
    assert np.abs(generator.prefill(prompt) - logits).max() <= 1e-4
    assert generator.generate(100) == expected
    assert len(expected) == 100 or expected[-1] in bundle.manifest.stop_tokens


@pytest.mark.parametrize("context", [8, WINDOW, WINDOW + 1, WINDOW + 64])
def test_a_context_near_the_window_is_exact_to_its_end(
    tiny: TinyCheckpoint, export: Export, context: int
) -> None:
    bundle = export(tiny.folder, "none", context=context)
    expected = eager_logits(tiny.model, TOKENS[:context]).numpy()
    generator = Generator(bundle)
    assert np.abs(generator.prefill(TOKENS[: context - 1]) - expected[-2]).max() <= 1e-4
    assert len(generator.generate(5)) == 1


def test_max_length_may_not_be_less_than_the_window(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    """onnxruntime-genai gives every cache at most `max_length` slots. docs/targets/onnx.md."""
    expected = eager_logits(tiny.model, TOKENS[:9]).numpy()[-1]
    exact = Generator(float_bundle, max_length=WINDOW).prefill(TOKENS[:9])
    assert np.abs(exact - expected).max() <= 1e-4
    with pytest.raises(RuntimeError, match=r"capacity \(15\) must be at least local_window_size"):
        Generator(float_bundle, max_length=WINDOW - 1).prefill(TOKENS[:9])


def test_full_caches_take_any_max_length_and_rewind(tiny: TinyCheckpoint, export: Export) -> None:
    bundle = export(tiny.folder, "none", context=CONTEXT, full_cache=True)
    expected = eager_logits(tiny.model, TOKENS[:130]).numpy()
    generator = Generator(bundle, max_length=WINDOW - 1)
    assert np.abs(generator.prefill(TOKENS[:9]) - expected[8]).max() <= 1e-4
    generator = Generator(bundle)
    generator.prefill([*TOKENS[:90], *[5] * 40])
    generator.raw.rewind_to(90)
    assert np.abs(generator.prefill(TOKENS[90:130]) - expected[-1]).max() <= 1e-4


def test_a_windowed_cache_rewinds_until_it_has_dropped_tokens(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    expected = eager_logits(tiny.model, TOKENS[:50]).numpy()[-1]
    generator = Generator(float_bundle)
    generator.prefill([*TOKENS[:30], *[5] * 40])
    generator.raw.rewind_to(30)
    assert np.abs(generator.prefill(TOKENS[30:50]) - expected).max() <= 1e-4
    generator.prefill(TOKENS[50:100])
    with pytest.raises(RuntimeError, match="Cannot rewind to 30"):
        generator.raw.rewind_to(30)


def test_the_graph_shares_all_weights_and_is_in_the_manifest(int4_bundle: Bundle) -> None:
    ours, theirs = (_external(int4_bundle.directory / name) for name in (MODEL, GENAI))
    assert ours
    assert ours == theirs
    manifest = open_bundle(int4_bundle.directory).manifest
    assert {GENAI, CONFIG} <= set(manifest.files)
    assert manifest.roles["genai"] == CONFIG


def test_the_config_has_the_stops_and_sampling_values_of_the_manifest(text_bundle: Bundle) -> None:
    config, manifest = _config(text_bundle), text_bundle.manifest
    assert tuple(config["model"]["eos_token_id"]) == manifest.stop_tokens
    sampling = manifest.sampling
    assert sampling is not None
    search = config["search"]
    assert search["do_sample"]
    assert (search["temperature"], search["top_k"]) == (sampling.temperature, sampling.top_k)
    assert search["top_p"] == sampling.top_p
    assert Generator(text_bundle, do_sample=True, random_seed=3).raw is not None


def test_the_tokenizer_gives_the_ids_of_ours(text_bundle: Bundle) -> None:
    ours = load_tokenizer(text_bundle)
    theirs = og.Tokenizer(og.Model(str(text_bundle.directory)))
    for text in ("the user", "é🙂 in\n\nthing", "<b>x</b>", "a  b"):
        assert [int(token) for token in theirs.encode(text)] == ours.encode(text)
    # A run of spaces is one added token of Gemma, and onnxruntime-genai prints it as it is stored.
    assert theirs.decode(np.array(ours.encode("a  b"), np.int32)) == "a▁▁b"


def test_the_chat_template_gives_the_ids_of_ours(text_bundle: Bundle) -> None:
    turns = [Message("user", "the user"), Message("assistant", "in"), Message("user", "thing")]
    manifest = text_bundle.manifest
    ours = encode_chat(
        load_tokenizer(text_bundle), manifest.chat_template, turns, manifest.bos_token
    )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    theirs = og.Tokenizer(og.Model(str(text_bundle.directory)))
    text = theirs.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
    assert [int(token) for token in theirs.encode(text)] == ours


def _config(bundle: Bundle) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((bundle.directory / CONFIG).read_text())
    return config


def _external(path: Path) -> dict[str, str]:
    """Where each tensor outside the graph lies."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {
        tensor.name: str([(entry.key, entry.value) for entry in tensor.external_data])
        for tensor in tensors
        if tensor.external_data
    }
