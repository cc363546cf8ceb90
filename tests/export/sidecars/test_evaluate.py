"""`--eval-text` and `gemma-runtime eval`: compare a bundle with the float32 teacher on a text."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemma_export.cache_command import find_entries
from gemma_export.checkpoint import Checkpoint
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter, Tick
from gemma_export.quantize.recipe import find_recipe
from gemma_export.sidecars.teacher import record_teacher
from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.cache import cache_folder
from gemma_runtime.cli import run_command
from gemma_runtime.errors import BundleError, CheckpointError, TokenizerError
from gemma_runtime.proof.evaluate import evaluate_bundle, teacher_kl
from gemma_runtime.proof.teacher import TEACHER, load_teacher
from gemma_runtime.proof.texts import encode_segments
from gemma_runtime.session import open_session
from gemma_runtime.text.tokenizer import load_tokenizer
from tests.export.conftest import TinyCheckpoint
from tests.export.gguf_files import GEMMA2, write_tiny

TEXTS = {"fruit": "banana bananas an ana", "short": "ban", "lines": "an\n\nan ban\nbananas  a s"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file for each text."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Bundle]:
    """A tiny Gemma 2 with softcaps in float32, int8 and int4; each bundle contains the teacher."""
    work = tmp_path_factory.mktemp("eval")
    source = write_tiny(work, GEMMA2)
    exported = {}
    for recipe in ("none", "int8", "int4"):
        exported[recipe] = export_with_text(source, recipe, work / recipe, folder)
    return exported


def export_with_text(source: Path, recipe: str, output: Path, text: Path) -> Bundle:
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe(recipe),
        checkpoint=str(source),
        context_length=64,
        output=output,
        eval_text=text,
    )
    export_bundles(request, QuietReporter())
    return open_bundle(output)


def test_the_float32_bundle_agrees_with_the_teacher(bundles: dict[str, Bundle]) -> None:
    evaluation = evaluate_bundle(bundles["none"])
    assert sorted(text.name for text in evaluation.texts) == sorted(TEXTS)
    for figures in (*evaluation.texts, evaluation.total):
        assert figures.teacher is not None
        assert figures.teacher.kl.value == pytest.approx(0, abs=1e-6)
        assert figures.teacher.ratio.value == pytest.approx(1, abs=1e-4)
        assert figures.teacher.top1 == 1
        assert figures.perplexity == pytest.approx(figures.teacher.perplexity, rel=1e-4)
    assert evaluation.note == "against the float32 teacher's stored probabilities"


def test_fewer_bits_give_a_larger_kl_to_the_teacher(bundles: dict[str, Bundle]) -> None:
    kl = {}
    for recipe, bundle in bundles.items():
        teacher = evaluate_bundle(bundle).total.teacher
        assert teacher is not None
        kl[recipe] = teacher.kl.value
    assert kl["none"] < kl["int8"] < kl["int4"]


def test_the_figures_match_those_of_full_distributions(bundles: dict[str, Bundle]) -> None:
    """The teacher keeps more tokens than the vocabulary has: the bucket for the rest is empty."""
    evaluation = evaluate_bundle(bundles["int4"])
    for segment in evaluation.texts:
        manifest = bundles["int4"].manifest
        encode = load_tokenizer(bundles["int4"]).encode
        encoded = encode_segments(TEXTS, encode, manifest.bos_token, manifest.context_length)
        ids = encoded[segment.name]
        with open_session(bundles["none"]) as teacher, open_session(bundles["int4"]) as session:
            log_p, log_q = log_softmax(teacher.score(ids)), log_softmax(session.score(ids))
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        assert segment.teacher is not None
        assert segment.teacher.kl.value == pytest.approx(kl.mean(), rel=1e-3, abs=1e-5)
        assert segment.teacher.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-3, abs=1e-5)
        assert segment.teacher.top1 == np.mean(log_p.argmax(-1) == log_q.argmax(-1))
        next_log_q = log_q[np.arange(len(ids) - 1), ids[1:]]
        assert segment.perplexity == pytest.approx(np.exp(-next_log_q.mean()), rel=1e-4)
        assert segment.positions == len(ids) - 1


@pytest.mark.parametrize("length", [31, 32, 33, 34])
def test_a_segment_may_end_anywhere_in_a_chunk(bundles: dict[str, Bundle], length: int) -> None:
    """A last chunk of one token has nothing to predict; it raised an IndexError."""
    text = "s" * (length - 1)
    assert len(load_tokenizer(bundles["int8"]).encode(text)) == length - 1
    evaluation = evaluate_bundle(bundles["int8"], {"letters": text})
    assert evaluation.total.positions == length - 1
    assert np.isfinite(evaluation.total.perplexity)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    log_p: NDArray[np.floating] = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return log_p


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 40))
def test_the_kl_with_a_bucket_is_a_lower_bound_short_by_the_kl_inside_the_bucket(
    seed: int, k: int
) -> None:
    """Kept tokens are compared one by one; the others count as one token, the bucket."""
    generator = np.random.default_rng(seed)
    p, q = (generator.standard_normal((3, 40)).astype(np.float32) * 2 for _ in range(2))
    log_p, log_q = log_softmax(p.astype(np.float64)), log_softmax(q.astype(np.float64))
    ids = np.argsort(-p, axis=-1)[:, :k].astype(np.int32)
    bucketed = teacher_kl(q, ids, np.take_along_axis(log_p, ids, -1).astype(np.float32))
    full = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert (bucketed <= full + 1e-5).all()
    tail_p, tail_q = log_p.copy(), log_q.copy()
    for tail in (tail_p, tail_q):
        np.put_along_axis(tail, ids, -np.inf, -1)
    if k < 40:
        rest = np.exp(np.logaddexp.reduce(tail_p, axis=-1))
        inside = np.exp(tail_p) / rest[:, None]
        with np.errstate(invalid="ignore"):
            gap = np.where(inside > 0, inside * (log_softmax(tail_p) - log_softmax(tail_q)), 0)
        np.testing.assert_allclose(bucketed + rest * gap.sum(-1), full, atol=1e-4)
    else:
        np.testing.assert_allclose(bucketed, full, atol=1e-4)


def test_a_text_without_a_teacher_has_only_a_perplexity_and_a_note(
    bundles: dict[str, Bundle],
) -> None:
    evaluation = evaluate_bundle(bundles["int4"], {"other": "an ban", "fruit": TEXTS["fruit"]})
    assert [text.name for text in evaluation.texts] == ["fruit", "other"]
    assert evaluation.texts[0].teacher is not None
    assert evaluation.texts[1].teacher is None
    assert evaluation.note == "1 of 2 texts have a teacher"
    alone = evaluate_bundle(bundles["int4"], {"other": "an ban"})
    assert alone.total.teacher is None
    assert alone.note.startswith("perplexity only: the bundle has no teacher for this text")


def test_texts_of_a_language_are_pooled_with_and_without_a_teacher(
    bundles: dict[str, Bundle],
) -> None:
    texts = {"ba/1": TEXTS["fruit"], "ba/2": TEXTS["short"], "an": TEXTS["lines"]}
    evaluation = evaluate_bundle(bundles["int4"], texts)
    pooled = {text.name: text for text in evaluation.texts}
    alone = evaluate_bundle(bundles["int4"], {"fruit": TEXTS["fruit"], "short": TEXTS["short"]})
    assert sorted(pooled) == ["an", "ba"]
    assert pooled["ba"].perplexity == alone.total.perplexity
    assert pooled["ba"].teacher == alone.total.teacher


def test_bytes_and_characters_are_those_of_the_predicted_tokens(bundles: dict[str, Bundle]) -> None:
    """The last token kept may end within a character, so the text's own length is no measure."""
    encode = load_tokenizer(bundles["int8"]).encode
    for text in ("an ban", "ana" * 200):
        (figures,) = evaluate_bundle(bundles["int8"], {"text": text}).texts
        kept = min(len(encode(text)), bundles["int8"].manifest.context_length - 1)
        assert figures.positions == kept
        size = figures.positions / figures.tokens_per_character
        bits = figures.positions * np.log2(figures.perplexity)
        assert figures.bits_per_byte == pytest.approx(bits / size)
        decoded = load_tokenizer(bundles["int8"]).decode(encode(text)[:kept])
        assert size == pytest.approx(len(decoded))


def test_noise_is_nothing_with_float_activations(bundles: dict[str, Bundle]) -> None:
    exact = evaluate_bundle(bundles["int8"], noise=True, exact=True)
    for figures in (*exact.texts, exact.total):
        assert figures.noise is not None
        assert figures.noise.kl.value == pytest.approx(0, abs=1e-6)
        assert figures.noise.ratio.value == pytest.approx(1, abs=1e-4)
    assert exact.exact
    assert evaluate_bundle(bundles["int8"]).total.noise is None


def test_the_exact_graph_is_nearer_to_the_teacher(bundles: dict[str, Bundle]) -> None:
    kl = [evaluate_bundle(bundles["int8"], exact=exact).total.teacher for exact in (True, False)]
    assert kl[0] is not None
    assert kl[1] is not None
    assert kl[0].kl.value < kl[1].kl.value


def test_the_command_prints_json_or_a_table(
    bundles: dict[str, Bundle], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(bundles["int8"].directory)
    assert run_command(["eval", bundle, "--text", str(folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert sorted(text["name"] for text in figures["texts"]) == sorted(TEXTS)
    assert figures["worst"]["name"] == figures["texts"][0]["name"]
    assert figures["worst"]["measure"] == "kl"
    assert figures["total"]["teacher"]["top1"] > 0.5
    assert run_command(["eval", bundle, "--exact", "--noise"]) == 0
    out = capsys.readouterr().out
    for shown in ("worst text: ", "perplexity", "noise", "with float activations"):
        assert shown in out


def test_the_error_for_a_bundle_without_text_says_how_to_give_one(
    bundles: dict[str, Bundle],
) -> None:
    bundle = bundles["int4"]
    bare = replace(bundle, manifest=replace(bundle.manifest, roles={"tokenizer": "tokenizer.json"}))
    with pytest.raises(TokenizerError, match="no evaluation text; give --text, or export with"):
        evaluate_bundle(bare)


def test_a_damaged_teacher_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    content = (bundles["int4"].directory / TEACHER).read_bytes()
    (tmp_path / TEACHER).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match="is not a teacher file"):
        load_teacher(tmp_path / TEACHER)


def test_an_evaluation_text_without_a_tokenizer_is_refused(
    tmp_path: Path, tiny: TinyCheckpoint, folder: Path
) -> None:
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe("int4"),
        checkpoint=str(tiny.folder),
        context_length=64,
        output=tmp_path / "out",
        eval_text=folder,
    )
    with pytest.raises(CheckpointError, match="no tokenizer, so --eval-text can't be encoded"):
        export_bundles(request, QuietReporter())


def test_a_second_export_takes_the_kept_teacher_and_mends_a_damaged_one(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[object] = []

    def record(
        checkpoint: Checkpoint, segments: dict[str, list[int]], tick: Tick, device: torch.device
    ) -> object:
        recorded.append(segments)
        return record_teacher(checkpoint, segments, tick, device)

    monkeypatch.setattr("gemma_export.sidecars.kept_teacher.record_teacher", record)
    expected = bundles["int8"].path("teacher").read_bytes()
    source = next(bundles["int8"].directory.parent.glob("*.gguf"))
    (kept,) = [
        entry.path / TEACHER
        for entry in find_entries(cache_folder())
        if entry.kind == "teacher" and (entry.path / TEACHER).read_bytes() == expected
    ]

    def export_again(name: str) -> bytes:
        bundle = export_with_text(source, "int8", tmp_path / name, folder)
        return bundle.path("teacher").read_bytes()

    assert export_again("kept") == expected
    assert not recorded
    kept.write_bytes(expected[:-100])
    assert export_again("mended") == expected
    assert len(recorded) == 1
    assert kept.read_bytes() == expected
