"""GGUF bundles: the store's codes in ggml's blocks, and the same probabilities in llama.cpp."""

import copy
import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as ggml_dequantize
from tokenizers import Tokenizer

from gemma_export.checkpoint.gguf import open_gguf
from gemma_export.checkpoint.gguf_tokenizer import rebuild_tokenizer
from gemma_export.checkpoint.packaged import find_demo_gguf
from gemma_export.checkpoint.piece_tokenizer import BYTE
from gemma_export.formats.codes import Codes, dequantize, pack
from gemma_export.formats.format import Format
from gemma_export.formats.gguf_file import read_header
from gemma_export.model.hf_config import config_from_hf
from gemma_export.model.official import Json
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets.gguf.block_types import block_type
from gemma_export.targets.gguf.blocks import pack_blocks
from gemma_export.targets.gguf.metadata import model_metadata
from gemma_export.targets.gguf.target import GgufTarget
from gemma_export.targets.gguf.vocabulary import gguf_vocabulary, make_vocabulary
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import CheckpointError, MissingExtra, SessionError, TargetError
from gemma_runtime.measure.bench import measure
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from tests.export.checkpoint.test_gguf_tokenizer import HERE, metadata
from tests.export.conftest import TinyCheckpoint, only
from tests.export.gguf_files import GEMMA1, GEMMA2, GEMMA3, GEMMA4, GEMMA4_DENSE, write_tiny
from tests.export.llama_server import LlamaServer
from tests.export.models import VAULT, eager_logits, save_tiny, with_head_scale
from tests.export.rewinding import (
    check_operations,
    check_resumes,
    check_resumes_from_file,
    check_rewinds,
    cut,
)
from tests.runtime.conftest import small_tokenizer

Q4_0, Q4_1, Q8_0 = (GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))
MODELS = pytest.mark.parametrize(
    "hf",
    [GEMMA1, GEMMA2, GEMMA3, GEMMA4, GEMMA4_DENSE],
    ids=["gemma1", "gemma2", "gemma3", "gemma4", "gemma4-dense"],
)
# Of log-probabilities, which int8 activations and float16 caches change by about half of this.
QUANTIZED_ATOL, FLOAT_ATOL = 0.3, 0.02


def export_gguf(folder: Path, source: Path, recipe: str, target: str = "gguf") -> Bundle:
    request = ExportRequest(
        targets=(target,),
        recipe=find_recipe(recipe),
        checkpoint=str(source),
        context_length=128,
        prefill_length=32,
        output=folder / f"{recipe}-{target}",
    )
    return export_bundles(request, QuietReporter())[0].bundle


def random_codes(fmt: Format, zero_step: int = 1) -> Codes:
    generator = torch.Generator().manual_seed(3)
    groups, top = 256 // fmt.group, 1 << fmt.bits
    codes = torch.randint(0, top, (6, 256), generator=generator, dtype=torch.uint8)
    scales = torch.randn(6, groups, generator=generator).half()  # of both signs, as in Q4_0
    zeros = torch.randint(0, 16 // zero_step, (6, groups), generator=generator, dtype=torch.uint8)
    packed = pack(zeros * zero_step, 4) if fmt.asymmetric else None
    return Codes(pack(codes, fmt.bits), scales, packed)


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [
        (Format(4), Q4_0),
        (Format(4, 128), Q4_0),
        (Format(8), Q8_0),
        (Format(8, 64), Q8_0),
        (Format(4, 32, True), Q4_1),
    ],
    ids=str,
)
def test_ggml_dequantizes_every_block_to_the_values_of_the_store(
    fmt: Format, kind: GGMLQuantizationType
) -> None:
    codes = random_codes(fmt, zero_step=8)
    assert block_type(fmt) == kind.name
    read = ggml_dequantize(pack_blocks("w", codes, fmt).numpy(), kind)
    # Q4_1 computes scale * code + minimum, the store scale * (code - zero).
    np.testing.assert_allclose(read, dequantize(codes, fmt).numpy(), rtol=1e-6, atol=1e-6)
    if not fmt.asymmetric:
        assert np.array_equal(read, dequantize(codes, fmt).numpy())


def test_a_minimum_that_float16_can_t_represent_is_refused() -> None:
    fmt = Format(4, 32, True)
    with pytest.raises(TargetError, match="can't store w exactly: Q4_1 stores"):
        pack_blocks("w", random_codes(fmt), fmt)


@pytest.mark.parametrize("fmt", [Format(4, 16), Format(8, 16), Format(8, 32, True)], ids=str)
def test_formats_without_a_block_type_are_refused_before_any_work(fmt: Format) -> None:
    target = GgufTarget()
    with pytest.raises(TargetError, match=f"can't store w as {fmt}; it supports"):
        target.check({"w": fmt}, None)  # type: ignore[arg-type]


@MODELS
@pytest.mark.parametrize("recipe", ["int4", "int8", "int8-channel", "none"])
def test_the_exported_file_opens_as_a_checkpoint_with_the_store_s_weights(
    tmp_path: Path, hf: Json, recipe: str
) -> None:
    source = open_gguf(write_tiny(tmp_path, hf))
    bundle = export_gguf(tmp_path, source.path, recipe)
    written = open_gguf(bundle.directory / "model.gguf")
    assert written.config == source.config
    store = open_or_build_store(source, find_recipe(recipe))
    for name, shape in store.shapes.items():
        expected = store.weight(name).rows(0, shape[0])
        # A gain is stored as 1 + w in float32, so w is rounded.
        atol = 1e-7 if len(shape) == 1 else 0
        torch.testing.assert_close(written.rows(name, 0, shape[0]), expected, rtol=0, atol=atol)


@MODELS
@pytest.mark.parametrize("recipe", ["int4", "int8", "none"])
def test_llama_cpp_gives_the_probabilities_of_the_exact_graph(
    tmp_path: Path, hf: Json, recipe: str
) -> None:
    source = write_tiny(tmp_path, hf)
    server = LlamaServer(export_gguf(tmp_path, source, recipe).directory / "model.gguf")
    atol = FLOAT_ATOL if recipe == "none" else QUANTIZED_ATOL
    prompt = np.random.default_rng(1).integers(0, 22, 41).tolist()  # more than two windows of 16
    with open_session(export_gguf(tmp_path, source, recipe, "onnx"), exact=True) as session:
        logits = session.score(prompt)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    for length in (1, 5, 16, 17, 32, 41):
        llama_log_p = server.log_probabilities(prompt[:length], 64)
        np.testing.assert_allclose(llama_log_p, log_p[length - 1], atol=atol)


def test_a_vaultgemma_without_windows_and_softcaps_is_written_as_a_gemma_1(tmp_path: Path) -> None:
    """llama.cpp has no architecture for VaultGemma; that of Gemma 1 computes the official one."""
    config = copy.deepcopy(VAULT.config)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.attn_logit_softcapping = config.final_logit_softcapping = None
    plain = with_head_scale(replace(VAULT, config=config))
    model = save_tiny(plain, tmp_path / "vault")

    bundle = export_gguf(tmp_path, tmp_path / "vault", "none")

    path = bundle.directory / "model.gguf"
    assert read_header(path).metadata["general.architecture"] == "gemma"
    tokens = np.random.default_rng(1).integers(0, 96, 41).tolist()
    with open_session(export_gguf(tmp_path, path, "none", "onnx"), threads=1) as session:
        logits = session.score(tokens)
    # A GGUF file doesn't say that the scale of embeddings wasn't rounded to bfloat16.
    np.testing.assert_allclose(logits, eager_logits(model, tokens).numpy(), atol=5e-3)


@only(VAULT)
def test_another_vaultgemma_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="VaultGemma with layers with a window and softcaps"):
        export_gguf(tmp_path, tiny.folder, "none")


@MODELS
def test_the_bundle_passes_verify_in_llama_cpp(tmp_path: Path, hf: Json) -> None:
    pytest.importorskip(
        "llama_cpp", reason="NOT TESTED in llama.cpp; run: pip install llama-cpp-python"
    )
    bundle = export_gguf(tmp_path, write_tiny(tmp_path, hf), "int4")
    assert verify_bundle(bundle).verdict is Verdict.PASS


@MODELS
def test_llama_cpp_goes_back_exactly_from_anywhere(tmp_path: Path, hf: Json) -> None:
    pytest.importorskip(
        "llama_cpp", reason="NOT TESTED in llama.cpp; run: pip install llama-cpp-python"
    )
    bundle = export_gguf(tmp_path, write_tiny(tmp_path, hf), "int4")
    tokens = np.random.default_rng(1).integers(0, 22, 128).tolist()
    positions = range(1, 90)
    with open_session(bundle, threads=1) as session, open_session(bundle, threads=1) as fresh:
        for back, mark in ((1, False), (30, False), (30, True)):
            assert check_rewinds(session, tokens, positions, back, mark) == [*positions]
        check_operations(session, fresh, [("feed", 20), ("hold", 0), *[("feed", 40)] * 2])
        check_operations(session, fresh, [*[("feed", 30), ("rewind", 1), ("feed", 9)] * 4])


@MODELS
def test_llama_cpp_goes_on_from_a_snapshot(tmp_path: Path, hf: Json) -> None:
    pytest.importorskip(
        "llama_cpp", reason="NOT TESTED in llama.cpp; run: pip install llama-cpp-python"
    )
    bundle = export_gguf(tmp_path, write_tiny(tmp_path, hf), "int4")
    tokens = np.random.default_rng(1).integers(0, 22, 128).tolist()
    with open_session(bundle, threads=1) as session, open_session(bundle, threads=1) as other:
        for length, chunk in ((1, 1), (15, 1), (16, 7), (35, 128), (35, 3), (100, 128)):
            check_resumes(session, other, cut(tokens[:length], chunk), goes_back=False)
        check_resumes_from_file(session, other, bundle, tmp_path / "file.safetensors")


def test_a_resumed_llama_cpp_goes_back_to_the_snapshot_or_to_the_start(tmp_path: Path) -> None:
    """Its snapshots hold no more than one window of local layers, though its caches do."""
    pytest.importorskip(
        "llama_cpp", reason="NOT TESTED in llama.cpp; run: pip install llama-cpp-python"
    )
    bundle = export_gguf(tmp_path, write_tiny(tmp_path, GEMMA3), "int4")
    tokens = np.random.default_rng(1).integers(0, 22, 100).tolist()
    with open_session(bundle, threads=1) as session:
        session.prefill(tokens[:35])
        snapshot = session.save()
        expected = session.prefill(tokens[35:50])
        session.resume(snapshot)
        session.prefill(tokens[50:])
        assert session.rewind(35) == 35
        assert np.array_equal(session.prefill(tokens[35:50]), expected)
        assert session.rewind(20) == 0


def test_bytes_that_are_no_snapshot_of_llama_cpp_are_refused(tmp_path: Path) -> None:
    pytest.importorskip(
        "llama_cpp", reason="NOT TESTED in llama.cpp; run: pip install llama-cpp-python"
    )
    bundle = export_gguf(tmp_path, write_tiny(tmp_path, GEMMA3), "int4")
    rng = np.random.default_rng(5)
    with open_session(bundle, threads=1) as session:
        expected = session.prefill([5, 7, 11, 3])
        snapshot = session.save()
        (state,) = snapshot.caches.values()
        for size in (0, 1, 40, state.size // 2, state.size - 1):
            with pytest.raises(SessionError, match=r"llama\.cpp can't read the snapshot"):
                session.resume(replace(snapshot, caches={"state": state[:size]}))
        for _ in range(300):
            broken = state.copy()
            broken[rng.integers(0, 200, 3)] = rng.integers(0, 256, 3)
            with suppress(SessionError):  # bytes of keys and values only change the numbers
                session.resume(replace(snapshot, caches={"state": broken}))
        session.reset()
        assert np.array_equal(session.prefill([5, 7, 11, 3]), expected)


def test_a_benchmark_prints_its_figures(tmp_path: Path) -> None:
    """After measuring, it failed: it looked up the version of a package named "llama.cpp"."""
    pytest.importorskip(
        "llama_cpp", reason="NOT TESTED in llama.cpp; run: pip install llama-cpp-python"
    )
    bundle = export_gguf(tmp_path, write_tiny(tmp_path, GEMMA3), "int4")

    benchmark = measure([bundle.directory], threads=1, repeats=1, new_tokens=2)

    assert benchmark.machine.runtimes.keys() == {"llama-cpp-python"}


def test_opening_a_session_without_llama_cpp_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    bundle = export_gguf(tmp_path, write_tiny(tmp_path, GEMMA3), "int4")
    with pytest.raises(MissingExtra, match=r"llama-cpp-python is not .*'gemma-export\[llama\]'"):
        open_session(bundle)


def test_a_query_scale_that_llama_cpp_does_not_support_is_refused(tiny: TinyCheckpoint) -> None:
    config = replace(tiny.open().config, query_scale=24**-0.5)
    with pytest.raises(TargetError, match="can't store query_pre_attn_scalar 24"):
        model_metadata("m", config)


def test_a_checkpoint_without_a_tokenizer_gives_a_file_without_a_vocabulary(
    tmp_path: Path, tiny: TinyCheckpoint
) -> None:
    checkpoint = tiny.open()
    assert gguf_vocabulary(checkpoint) == {"tokenizer.ggml.model": "no_vocab"}


def test_the_vocabulary_survives_a_round_trip_through_gguf() -> None:
    original = rebuild_tokenizer(HERE, metadata())
    config = replace(config_from_hf(GEMMA3), vocab_size=22)
    again = rebuild_tokenizer(HERE, make_vocabulary("m", original, config))
    assert json.loads(again) == json.loads(original)


def test_merges_that_scores_can_t_express_are_refused() -> None:
    """Two merges make one token, at different ranks; llama.cpp gives a token a single rank."""
    tokenizer = json.loads(rebuild_tokenizer(HERE, metadata()))
    merges = tokenizer["model"]["merges"]
    merges.insert(len(merges), ["a", "n"])
    with pytest.raises(CheckpointError, match="merges into 'an' at two places"):
        make_vocabulary("m", json.dumps(tokenizer).encode(), config_from_hf(GEMMA3))


def test_a_tab_that_stands_for_its_byte_gets_the_byte_s_name() -> None:
    """As in Gemma 2's own vocabulary. llama.cpp reads the number of a byte from its name."""
    tokenizer = json.loads(small_tokenizer().to_str())
    vocab = tokenizer["model"]["vocab"]
    tab = vocab.pop("<0x09>")
    vocab["\t"] = tab
    config = replace(config_from_hf(GEMMA2), vocab_size=len(vocab))
    keys = make_vocabulary("m", json.dumps(tokenizer).encode(), config)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    assert (tokens[tab], types[tab]) == ("<0x09>", BYTE)
    again = Tokenizer.from_str(rebuild_tokenizer(HERE, keys).decode())
    assert again.encode("in\tin", add_special_tokens=False).ids == [vocab["in"], tab, vocab["in"]]


@pytest.mark.real
def test_the_real_vocabulary_gets_the_original_scores(tmp_path: Path) -> None:
    original = read_header(find_demo_gguf()).metadata
    checkpoint = open_gguf(find_demo_gguf())
    files = checkpoint.tokenizer()
    assert files is not None
    rebuilt = make_vocabulary("m", files.tokenizer_json, checkpoint.config)
    assert rebuilt["tokenizer.ggml.tokens"] == original["tokenizer.ggml.tokens"]
    types = original["tokenizer.ggml.token_type"]
    assert np.array_equal(np.asarray(rebuilt["tokenizer.ggml.token_type"]), np.asarray(types))
    scores = [np.asarray(m["tokenizer.ggml.scores"]) for m in (rebuilt, original)]
    merged = scores[1] > -236249  # characters follow the merges; only their order matters
    assert np.array_equal(scores[0][merged], scores[1][merged])
    assert np.array_equal(
        np.argsort(scores[0], kind="stable"), np.argsort(scores[1], kind="stable")
    )


@pytest.mark.real
def test_the_real_model_gives_almost_the_same_tokens_in_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="NOT TESTED in llama.cpp; run: pip install xllamacpp")
    request = ExportRequest(
        targets=("gguf", "onnx"),
        recipe=find_recipe("int4"),
        checkpoint="demo",
        context_length=512,
        output=tmp_path,
        force=True,
    )
    gguf, onnx = (result.bundle for result in export_bundles(request, QuietReporter()))
    text = "The history of the lighthouse. Die Geschichte der Leuchttürme. 灯台の歴史は"
    server = LlamaServer(gguf.directory / "model.gguf", 512)
    steps = server.greedy(text, 24, top=16)
    tokens = [step["id"] for step in steps]
    from gemma_runtime.text.tokenizer import load_tokenizer

    prompt = [2, *load_tokenizer(onnx).encode(text)]
    with open_session(onnx, exact=True) as session:
        logits = session.score([*prompt, *tokens])[len(prompt) - 1 : -1]  # (24, V)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    lead = logits.max(-1) - logits[np.arange(24), tokens]
    assert (lead <= 0.5).all()
    assert np.mean(logits.argmax(-1) == tokens) > 0.85
    deltas = [
        abs(one["logprob"] - log_p[place, one["id"]])
        for place, step in enumerate(steps)
        for one in step["top_logprobs"]
    ]
    assert np.mean(deltas) < 0.3
