"""A bundle's vectors are those of transformers with the folder's modules."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from gemma_runtime.bundle import MANIFEST, describe_files
from gemma_runtime.contents.inspection import read_codes_back
from gemma_runtime.embedding.embedder import open_embedder
from gemma_runtime.embedding.verify import (
    load_embedding_goldens,
    save_embedding_goldens,
    verify_embeddings,
)
from gemma_runtime.embedding_bundle import EmbeddingBundle, open_embedding_bundle
from gemma_runtime.errors import BundleError, ContextFull, SessionError, TokenizerError
from gemma_runtime.proof.verify import Verdict
from tests.export.embedding.conftest import export, set_template
from tests.export.embedding.encoders import DOCUMENT, QUERY, their_vector

# Around both windows, which reach 8 tokens to each side, and beyond two of them.
LENGTHS = (1, 2, 8, 9, 10, 17, 18, 40, 128)


@pytest.fixture(scope="module")
def exact(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingBundle:
    return export(saved, "none", tmp_path_factory.mktemp("exact") / "none")


def test_vectors_of_any_length_are_those_of_transformers(
    saved: Path, exact: EmbeddingBundle
) -> None:
    """Tokens at distance 8 are seen, those at 9 are not, and global layers see all."""
    draw = np.random.default_rng(5)
    with open_embedder(exact) as embedder:
        for length in LENGTHS:
            tokens = draw.integers(0, 512, length).tolist()
            ours, theirs = embedder.run(tokens), their_vector(saved, tokens).numpy()
            assert np.abs(ours - theirs).max() < 1e-6, length
            assert ours.dot(ours) == pytest.approx(1, abs=1e-5)


def test_a_late_token_changes_the_vector_of_an_early_one(exact: EmbeddingBundle) -> None:
    """A causal graph would give the mean of states that don't know what follows."""
    tokens = [2, 300, 301, 302]
    with open_embedder(exact) as embedder:
        alike = embedder.run(tokens).dot(embedder.run([*tokens[:-1], 303]))
    assert alike < 0.999


@pytest.mark.parametrize("recipe", ["int8", "int4", "mixed"])
def test_quantized_bundles_pass_and_hold_the_codes(
    saved: Path, tmp_path: Path, recipe: str
) -> None:
    made = open_embedding_bundle(export(saved, recipe, tmp_path / recipe).directory)
    verification = verify_embeddings(made)
    assert verification.verdict is Verdict.PASS, verification.failures
    assert verification.exact is not None
    assert verification.exact.min_cosine > 1 - 1e-6
    assert verification.lowering.min_cosine > 0.999
    assert verification.quantization.min_cosine < verification.lowering.min_cosine
    assert read_codes_back(made) == made.manifest.quantization.codes_digest
    dense = {n: f for n, f in made.manifest.quantization.tensors.items() if n.startswith("dense.")}
    assert dense
    assert set(dense.values()) == {"int8-g32"}


def test_the_long_golden_is_beyond_both_windows(bundle: EmbeddingBundle) -> None:
    goldens = {g.name: g for g in load_embedding_goldens(bundle.path("goldens"))}
    assert len(goldens["long"].tokens) == 2 * 9 + 32
    assert {golden.tokens[0] for golden in goldens.values()} == {2}
    assert {golden.tokens[-1] for golden in goldens.values()} == {1}


def test_texts_have_the_tokens_of_sentence_transformers(
    first: Path, bundle: EmbeddingBundle
) -> None:
    """Prompt and text are one string, between bos and eos."""
    tokenizer = AutoTokenizer.from_pretrained(first)
    with open_embedder(bundle) as embedder:
        for prompt, beginning in ((None, ""), ("query", QUERY), ("document", DOCUMENT)):
            for text in ("the user", " in  ", "Grüße, 東京!", ""):
                expected = tokenizer(beginning + text)["input_ids"]
                assert embedder.encode(text, prompt) == expected


@pytest.mark.parametrize(
    ("template", "around"),
    [
        ("$A", ((), ())),
        ("$A <eos>", ((), (1,))),
        ("<bos> <bos> $A", ((2, 2), ())),
    ],
)
def test_the_tokenizer_s_template_decides_what_is_around_a_text(
    folder: Path, tmp_path: Path, template: str, around: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """As in transformers, for which the flags beside it mean nothing."""
    set_template(folder, template)
    made = export(folder, "int8", tmp_path / "made")
    assert (made.manifest.before, made.manifest.after) == around
    with open_embedder(made) as embedder:
        theirs = AutoTokenizer.from_pretrained(folder)("the user")["input_ids"]
        assert embedder.encode("the user") == theirs


def test_prompts_may_have_control_tokens_and_texts_may_not(folder: Path, tmp_path: Path) -> None:
    """A prompt is the checkpoint's own, like a chat template."""
    beginning = "the <start_of_turn>user "
    content = {"prompts": {"turn": beginning}, "default_prompt_name": "turn"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(content))
    with open_embedder(export(folder, "int8", tmp_path / "made")) as embedder:
        theirs = AutoTokenizer.from_pretrained(folder)(f"{beginning}the user")["input_ids"]
        assert embedder.encode("the user") == theirs
        assert embedder.encode("<start_of_turn>").count(theirs[3]) == 1  # the prompt's own


def test_control_tokens_in_a_text_stay_text(bundle: EmbeddingBundle) -> None:
    with open_embedder(bundle) as embedder:
        tokens = embedder.encode("a <eos> b")
    assert tokens.count(1) == 1


def test_texts_that_are_too_long_are_refused_or_cut(bundle: EmbeddingBundle) -> None:
    text = "x " * 300
    with open_embedder(bundle) as embedder:
        with pytest.raises(ContextFull, match=r"tokens, 126 fit; .* --truncate"):
            embedder.embed([text])
        cut = embedder.encode(text, truncate=True)
        assert (len(cut), cut[0], cut[-1]) == (128, 2, 1)
        assert embedder.embed([text], truncate=True).shape == (1, 64)
        for tokens, match in (
            ([1] * 129, "129 tokens, 128 fit"),
            ([], "no token"),
            ([512], "0 to 511"),
            ([-1], "0 to 511"),
        ):
            with pytest.raises(SessionError, match=match):
                embedder.run(tokens)


def test_shorter_vectors_are_the_first_numbers_at_length_1(bundle: EmbeddingBundle) -> None:
    with open_embedder(bundle) as embedder:
        whole = embedder.embed(["the user", "in"], "query")
        short = embedder.embed(["the user", "in"], "query", 16)
        assert np.allclose(short, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1)[:, None])
        assert embedder.embed([]).shape == (0, 64)
        assert embedder.embed([], dimensions=16).shape == (0, 16)
        for wrong in (0, 65):
            with pytest.raises(SessionError, match="expected 1 to 64"):
                embedder.embed(["a"], dimensions=wrong)
        with pytest.raises(SessionError, match="unknown prompt 'querry'; the bundle has: query"):
            embedder.embed(["a"], "querry")
    with pytest.raises(SessionError, match="closed"):
        embedder.run([1])


def test_a_bundle_without_a_tokenizer_takes_token_ids_only(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    made = export(folder, "int8", tmp_path / "made")
    assert verify_embeddings(made).verdict is Verdict.PASS
    with open_embedder(made) as embedder:
        assert embedder.run([2, 5, 1]).shape == (64,)
        with pytest.raises(TokenizerError, match="the bundle has no tokenizer"):
            embedder.embed(["a"])


def test_verify_fails_for_vectors_of_another_model(bundle: EmbeddingBundle, tmp_path: Path) -> None:
    goldens = load_embedding_goldens(bundle.path("goldens"))
    goldens[0].quantized[:] = goldens[1].quantized
    copy = _altered(bundle, tmp_path, lambda path: save_embedding_goldens(path, goldens))
    verification = verify_embeddings(copy)
    assert verification.verdict is Verdict.FAIL
    assert len(verification.failures) == 2  # of both graphs
    assert "least cosine of lowering" in verification.failures[0]


def test_a_float_bundle_is_held_to_the_limit_of_float_activations(
    exact: EmbeddingBundle, tmp_path: Path
) -> None:
    goldens = load_embedding_goldens(exact.path("goldens"))
    goldens[0].quantized[0] += 0.02  # a cosine of 0.9998
    copy = _altered(exact, tmp_path, lambda path: save_embedding_goldens(path, goldens))
    (failure,) = verify_embeddings(copy).failures
    assert "least cosine of lowering is 0.999" in failure


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "no goldens"),
        ("{", "not a goldens file"),
        ('[{"name":"a","tokens":[1],"reference":[1.0],"quantized":[1.0]}]', "sizes than 64"),
    ],
)
def test_damaged_goldens_are_refused(
    bundle: EmbeddingBundle, tmp_path: Path, content: str, match: str
) -> None:
    copy = _altered(bundle, tmp_path, lambda path: path.write_text(content))
    with pytest.raises(BundleError, match=match):
        verify_embeddings(copy)


def test_the_table_is_counted_as_looked_up(bundle: EmbeddingBundle) -> None:
    """No product reads it: it stays in a file of its own."""
    assert bundle.manifest.model.looked_up == 512 * 128
    table = bundle.manifest.files["table.onnx.data"].bytes
    assert table == 4096 * -(-512 * 128 // 4096) + 512 * 128 // 32 * 2  # codes, then scales


def _altered(bundle: EmbeddingBundle, tmp_path: Path, alter: object) -> EmbeddingBundle:
    """A copy with other goldens, and a manifest with their digest."""
    copy = Path(shutil.copytree(bundle.directory, tmp_path / "copy"))
    alter(copy / bundle.manifest.roles["goldens"])  # type: ignore[operator]
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"] = {
        name: {"sha256": file.sha256, "bytes": file.bytes}
        for name, file in describe_files(copy).items()
    }
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return open_embedding_bundle(copy)
