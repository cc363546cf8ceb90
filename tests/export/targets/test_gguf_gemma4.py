"""GGUF bundles of tiny Gemma 4s in llama.cpp; `test_gguf` has what they share with other families.

llama.cpp rounds more than the other runtimes: it looks gelu up in a table of float16, keeps keys
and values in float16, and its flash attention rounds queries too. The limits below are two to three
times what was measured.
"""

import copy
import ctypes
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from gemma_export.checkpoint.gguf import open_gguf
from gemma_export.checkpoint.gguf_tokenizer import rebuild_tokenizer
from gemma_export.checkpoint.packaged import find_demo_gguf
from gemma_export.cli import run as export_command
from gemma_export.formats.gguf_file import read_header
from gemma_export.formats.gguf_header import write_header
from gemma_export.model.config import GemmaConfig
from gemma_export.model.hf_config import config_from_hf
from gemma_export.model.sizes import find_official
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets.gguf.metadata import model_metadata
from gemma_export.targets.gguf.vocabulary import make_vocabulary
from gemma_runtime.bundle import open_bundle
from gemma_runtime.cli import run_command
from gemma_runtime.contents.gguf_names import gguf_name, hf_name
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.errors import TargetError
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.session import open_session
from tests.export.checkpoint.test_gguf_tokenizer import TEXTS
from tests.export.conftest import Export, TinyCheckpoint, dequantized, only
from tests.export.gguf_files import GEMMA4, llama_name
from tests.export.models import DENSE, E2B, E4B, UNIFIED, Tiny, eager_logits
from tests.export.targets.test_onnx import chunked
from tests.field.test_gemma4_folders import chatty

__all__ = ["chatty"]  # a fixture


def _shared(tiny: Tiny, count: int) -> Tiny:
    config = copy.deepcopy(tiny.config)
    config.num_kv_shared_layers = count
    return replace(tiny, name=f"{tiny.name}-{count}", config=config)


# As in the real E4B, the last two caches are of a local and of a global layer.
EDGE = _shared(E4B, 6)
every = only(E2B, EDGE, DENSE, UNIFIED)
LONG = np.random.default_rng(4).integers(0, 96, 250).tolist()


@pytest.fixture
def llama() -> Any:
    return pytest.importorskip(
        "llama_cpp", reason="NOT TESTED in llama.cpp; run: pip install llama-cpp-python"
    )


@every
def test_every_way_to_feed_tokens_gives_the_logits_of_transformers(
    llama: Any, tiny: TinyCheckpoint, export: Export
) -> None:
    expected = eager_logits(tiny.model, LONG).numpy()
    bundle = export(tiny.folder, "none", target="gguf", context=256)
    with open_session(bundle, threads=1) as session:
        for chunks in ([250], [1] * 250, [7] * 35, [24] * 10, [1] * 5 + [24, 3] * 9, [80, 65, 65]):
            session.reset()
            ends = np.cumsum(chunks) - 1
            assert np.abs(chunked(session, LONG, chunks) - expected[ends]).max() <= 0.1
        session.reset()
        scores = session.score(LONG)
    figures = compare_logits(scores, top_logits(expected, 96), tie_margin=0.1)
    print(figures)
    assert np.abs(scores - expected).max() <= 0.1
    assert figures.mean_kl <= 2e-5


@every
def test_with_float32_caches_only_gelu_is_rounded(
    llama: Any, tiny: TinyCheckpoint, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tighter limit than with llama.cpp's defaults, so that no small error hides."""
    defaults = llama.llama_context_default_params

    def exact() -> Any:
        settings = defaults()
        settings.type_k = settings.type_v = llama.GGML_TYPE_F32
        settings.flash_attn_type = 0  # disabled
        return settings

    monkeypatch.setattr(llama, "llama_context_default_params", exact)
    bundle = export(tiny.folder, "none", target="gguf", context=256)
    expected = eager_logits(tiny.model, LONG).numpy()
    with open_session(bundle, threads=1) as session:
        difference = np.abs(session.score(LONG) - expected)
    print(difference.max(), difference.mean())
    assert difference.max() <= 0.02
    assert difference.mean() <= 1e-3


@every
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_quantized_bundles_are_as_good_as_their_weights(
    llama: Any, tiny: TinyCheckpoint, export: Export, recipe: str
) -> None:
    bundle = export(tiny.folder, recipe, target="gguf", context=256)
    expected = eager_logits(dequantized(tiny, recipe), LONG).numpy()
    with open_session(bundle, threads=1) as session:
        figures = compare_logits(session.score(LONG), top_logits(expected, 96), tie_margin=0.1)
    print(figures)
    assert figures.mean_kl <= 3e-3  # activations are rounded to int8, as in the other runtimes
    assert codes_digest(bundle) == bundle.manifest.quantization.codes_digest


@every
@pytest.mark.parametrize("recipe", ["int4", "none"])
def test_the_exported_file_opens_as_a_checkpoint_with_the_store_s_weights(
    tiny: TinyCheckpoint, export: Export, recipe: str
) -> None:
    source = tiny.open()
    written = open_gguf(export(tiny.folder, recipe, target="gguf").directory / "model.gguf")
    assert written.config == replace(
        source.config,
        embed_scale=written.config.embed_scale,  # of bfloat16, which the tiny models are not
        per_layer_scale=written.config.per_layer_scale,
        eos_tokens=written.config.eos_tokens,
    )
    store = open_or_build_store(source, find_recipe(recipe))
    for name, shape in store.shapes.items():
        expected = store.weight(name).rows(0, shape[0])
        atol = 1e-7 if name.endswith("norm.weight") else 0  # 1 + (w - 1) is rounded
        assert (written.rows(name, 0, shape[0]) - expected).abs().max() <= atol, name


@every
def test_source_keeps_the_codes_of_a_gguf_file(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path
) -> None:
    first = export(tiny.folder, "int4", target="gguf", context=256)
    path = first.directory / "model.gguf"
    flags = ["--checkpoint", str(path), "--quant", "source", "--require-exact", "--prefill", "24"]
    for target in ("gguf", "onnx"):
        output = tmp_path / target
        assert export_command(["--target", target, *flags, "--output", str(output)]) == 0
        assert codes_digest(open_bundle(output)) == codes_digest(first)


@only(E2B)
def test_rows_of_the_per_layer_table_are_read_on_demand(
    llama: Any, tiny: TinyCheckpoint, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(llama.llama_model_default_params(), "lazy_mode"):
        pytest.skip("NOT TESTED: this llama.cpp reads whole tables")
    load, modes = llama.llama_model_load_from_file, []

    def spy(path: bytes, settings: Any) -> Any:
        modes.append(settings.lazy_mode)
        return load(path, settings)

    monkeypatch.setattr(llama, "llama_model_load_from_file", spy)
    with open_session(export(tiny.folder, "int4", target="gguf"), threads=1):
        assert modes == [llama.LLAMA_LAZY_MODE_ON]


def test_keys_are_those_that_llama_cpp_reads(tiny_edge: GemmaConfig) -> None:
    metadata = model_metadata("m", tiny_edge)
    own = {key.removeprefix("gemma4."): value for key, value in metadata.items()}
    assert metadata["general.architecture"] == "gemma4"
    for key, expected in {
        "feed_forward_length": [160] * 4 + [320] * 4,
        "attention.sliding_window_pattern": [True, False, True, False, True, True, True, False],
        "attention.head_count_kv": 1,
        "attention.shared_kv_layers": 4,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.key_length_swa": 16,
        "attention.value_length_swa": 16,
        "rope.dimension_count": 32,
        "rope.dimension_count_swa": 16,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "embedding_length_per_layer_input": 32,
        "final_logit_softcapping": 3.0,
    }.items():
        assert np.array_equal(np.asarray(own[key]), np.asarray(expected)), key
    assert "attn_logit_softcapping" not in own


@pytest.fixture(scope="module")
def tiny_edge() -> GemmaConfig:
    return config_from_hf(E2B.config.to_dict())


def test_names_are_those_of_the_gguf_package(tiny_edge: GemmaConfig) -> None:
    for name in tiny_edge.tensor_shapes():
        hf = {**GEMMA4, "num_hidden_layers": len(tiny_edge.kinds)}
        assert gguf_name(name) == llama_name(hf, name)
        assert hf_name(gguf_name(name)) == name


@only(E2B)
def test_rope_factors_let_a_quarter_of_the_pairs_turn(tiny: TinyCheckpoint, export: Export) -> None:
    path = export(tiny.folder, "int4", target="gguf").directory / "model.gguf"
    tensor = read_header(path).tensors["rope_freqs.weight"]
    data = path.read_bytes()[tensor.offset : tensor.offset + tensor.bytes]
    assert np.frombuffer(data, "<f4").tolist() == [1.0] * 4 + [np.float32(1e30)] * 12


def test_layers_that_would_read_other_caches_in_llama_cpp_are_refused() -> None:
    """It fixes which two caches they read; transformers takes the last one of each kind."""
    with pytest.raises(TargetError, match="layer 7, which reads the cache of layer 6: in llama"):
        model_metadata("m", config_from_hf(E4B.config.to_dict()))


def test_layers_of_one_kind_are_refused(tiny_edge: GemmaConfig) -> None:
    config = replace(tiny_edge, kinds=(tiny_edge.kinds[-1],) * 4, shared_layers=0)
    with pytest.raises(TargetError, match=r"layers are all global: llama\.cpp expects both kinds"):
        model_metadata("m", config)


def test_the_commands_work_on_a_bundle(
    llama: Any, chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the thing that using users is in the user\n" * 6)
    output = str(tmp_path / "bundle")
    flags = ["--checkpoint", str(chatty), "--quant", "int4", "--context", "128"]
    flags += ["--eval-text", str(text), "--output", output]
    assert export_command(["--target", "gguf", *flags]) == 0
    assert run_command(["verify", output]) == 0
    assert "PASS" in capsys.readouterr().out
    assert run_command(["eval", output, "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert run_command(["run", output, "the user", "--max-new-tokens", "8"]) == 0
    baked, system = str(tmp_path / "baked.safetensors"), tmp_path / "system.txt"
    system.write_text("the thing that users use " * 4)
    assert run_command(["bake", output, baked, "--text", str(system)]) == 0
    assert run_command(["run", output, "in us", "--baked", baked, "--max-new-tokens", "4"]) == 0
    assert run_command(["inspect", output]) == 0
    assert "3 more layers read the cache of layer 2" in capsys.readouterr().out
    again = open_gguf(Path(output) / "model.gguf")
    files = again.tokenizer()
    assert files is not None
    assert files.chat_template == (chatty / "chat_template.jinja").read_text()
    assert set(again.config.eos_tokens) == {1, 5, 8}
    assert again.generation.sampling is not None
    assert again.generation.sampling.top_k == 64


@pytest.mark.real
def test_llama_cpp_splits_text_as_the_real_vocabulary_does(llama: Any, tmp_path: Path) -> None:
    """Gemma 3's, of which Gemma 4 renamed markers; its runs of whitespace are no added tokens."""
    files = open_gguf(find_demo_gguf()).tokenizer()
    assert files is not None
    state = json.loads(files.tokenizer_json)
    kept = [t for t in state["added_tokens"] if t["special"] or t["content"].startswith("<unused")]
    content = json.dumps({**state, "added_tokens": kept}).encode()
    config = find_official("e2b").config
    metadata = model_metadata("m", config) | make_vocabulary("m", content, config)
    path = tmp_path / "vocabulary.gguf"
    with path.open("wb") as file:
        write_header(file, metadata, {})
    assert (
        json.loads(rebuild_tokenizer(path, read_header(path).metadata))["model"] == state["model"]
    )

    settings = llama.llama_model_default_params()
    settings.vocab_only = True
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    vocabulary = llama.llama_model_get_vocab(model)

    def split(text: str) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
        return list(ids[:count])

    original = Tokenizer.from_str(content.decode())
    assert [text for text in TEXTS if split(text) != original.encode(text).ids] == []
    llama.llama_model_free(model)
