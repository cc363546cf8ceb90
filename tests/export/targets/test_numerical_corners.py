"""Numbers at the edges, through every target: the smallest and largest values, tokens and prompts.

Compared with transformers in float32. Core ML and Core AI compute in float16, llama.cpp caches in
float16.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.gguf_tokenizer import rebuild_tokenizer
from gemma_export.quantize.calibrate.text import Calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_runtime.backend_table import BACKENDS
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import CheckpointError, RecipeError, SessionError, TargetError
from gemma_runtime.proof.goldens import log_softmax
from gemma_runtime.session import Logits, Session, open_session
from gemma_runtime.text.sampler import Sampler, Sampling
from tests.export.checkpoint.test_gguf_tokenizer import HERE, metadata
from tests.export.conftest import calibrated_store, export_folder
from tests.export.llama_server import LlamaServer
from tests.export.models import (
    SHORT_GEMMA2,
    SHORT_GEMMA3,
    WINDOW,
    Tiny,
    eager_logits,
    with_head_scale,
)

LAST = 95  # the last id of the tiny vocabularies
TOKENS = np.random.default_rng(2).integers(0, LAST + 1, 40).tolist()
Change = Callable[[PreTrainedModel], None]


def needing(package: str, target: str) -> Any:
    """The target, skipped where its package is missing."""
    missing = find_spec(package) is None
    return pytest.param(
        target, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed")
    )


# How far log-probabilities of ordinary size may be from those of transformers.
NEAR = {"onnx": 1e-4, "executorch": 1e-4, "coreml": 0.05, "coreai": 0.12, "gguf": 0.02}
FULL = ("onnx", needing("executorch", "executorch"))
HALF = (needing("coremltools", "coreml"), needing("coreai", "coreai"))
SESSIONS = pytest.mark.parametrize("target", [*FULL, *HALF])
TARGETS = pytest.mark.parametrize("target", [*FULL, *HALF, needing("xllamacpp", "gguf")])
FAMILIES = pytest.mark.parametrize("tiny", [SHORT_GEMMA2, SHORT_GEMMA3], ids=lambda t: t.name)


def scaled(ends: Sequence[str], factor: float) -> Change:
    """Multiplies what norms multiply by, and matrices, whose names end so."""

    def change(model: PreTrainedModel) -> None:
        changed = 0
        for name, weight in model.named_parameters():
            if name.endswith(tuple(ends)):
                changed += 1
                weight.add_(1).mul_(factor).sub_(1) if weight.dim() == 1 else weight.mul_(factor)
        assert changed

    return change


def faint(model: PreTrainedModel) -> None:
    """Weights and activations that are subnormal in float32, and others in float16."""
    scaled(["layers.0.self_attn.v_proj.weight"], 1e-40)(model)
    scaled(["layers.0.mlp.up_proj.weight", "layers.1.self_attn.k_proj.weight"], 1e-7)(model)
    (table,) = (w for n, w in model.named_parameters() if n.endswith("embed_tokens.weight"))
    table[5] = torch.sign(table[5]) * 1e-40
    table[6] *= 1e-7
    table[7] = 0


def loud(logits: float) -> Change:
    """Logits of this size, before the softcap if there is one, and attention scores of 1e4."""

    def change(model: PreTrainedModel) -> None:
        has_norms = any(name.endswith("q_norm.weight") for name, _ in model.named_parameters())
        attention = "q_norm.weight" if has_norms else "q_proj.weight"
        scaled([attention], 1e3)(model)
        cap, model.config.final_logit_softcapping = model.config.final_logit_softcapping, None
        largest = float(eager_logits(model, TOKENS).abs().max())
        model.config.final_logit_softcapping = cap
        scaled(["model.norm.weight"], logits / largest)(model)

    return change


CHANGES: dict[str, Change] = {"faint": faint, "loud": loud(5e4), "louder": loud(1e9)}


class Corners:
    """Models with a change, and their bundles; each is made once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._models: dict[tuple[str, str, bool], tuple[PreTrainedModel, Path]] = {}
        self._bundles: dict[tuple[str, str, str], Bundle] = {}

    def model(self, tiny: Tiny, change: str, target: str) -> PreTrainedModel:
        return self._made(tiny, change, target)[0]

    def bundle(self, tiny: Tiny, change: str, target: str) -> Bundle:
        key = (tiny.name, change, target)
        if key not in self._bundles:
            self._bundles[key] = export(self._made(tiny, change, target)[1], target)
        return self._bundles[key]

    def _made(self, tiny: Tiny, change: str, target: str) -> tuple[PreTrainedModel, Path]:
        key = (tiny.name, change, target == "gguf")
        if key not in self._models:
            folder = self._factory.mktemp(tiny.name) / change
            kind = with_head_scale(tiny) if target == "gguf" else tiny
            self._models[key] = save(kind, CHANGES[change], folder), folder
        return self._models[key]


def save(tiny: Tiny, change: Change, folder: Path) -> PreTrainedModel:
    model = tiny.build()
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    # llama.cpp answers nothing without a vocabulary.
    (folder / "tokenizer.json").write_bytes(rebuild_tokenizer(HERE, metadata()))
    return model


def export(folder: Path, target: str, quant: str = "none") -> Bundle:
    output = folder.with_name(f"{folder.name}-{quant}-{target}")
    return export_folder(folder, quant, output, context=64, prefill=8, target=target)


@pytest.fixture(scope="module")
def corners(tmp_path_factory: pytest.TempPathFactory) -> Corners:
    return Corners(tmp_path_factory)


def answers(bundle: Bundle, prompts: Sequence[list[int]]) -> NDArray[np.float64]:
    """Log-probabilities of the token after each prompt: (prompts, V)."""
    if bundle.manifest.target.name == "gguf":
        server = LlamaServer(bundle.directory / "model.gguf", 64)
        return np.stack([server.log_probabilities(prompt, LAST + 1) for prompt in prompts])
    with open_session(bundle, threads=1) as session:
        return log_softmax(np.stack([fed(session, prompt) for prompt in prompts]))


def fed(session: Session, prompt: list[int]) -> Logits:
    session.reset()
    return session.prefill(prompt)


def expected(model: PreTrainedModel, prompts: Sequence[list[int]]) -> NDArray[np.float64]:
    rows = [eager_logits(model, prompt).numpy()[-1] for prompt in prompts]
    return log_softmax(np.stack(rows))


@TARGETS
@FAMILIES
def test_subnormal_values_edge_tokens_and_single_tokens_give_the_probabilities_of_transformers(
    corners: Corners, tiny: Tiny, target: str
) -> None:
    """Tokens 5, 6 and 7 have rows of subnormal numbers and of zeros.

    Alone, the first two are zeros, or a few steps of 2^-24, in float16: then only finite.
    """
    prompts = [[0], [LAST], [2], [LAST, 0] * 12, [0] * 20, TOKENS, [7], [5], [6], [5, 6, 7]]
    wanted = expected(corners.model(tiny, "faint", target), prompts)
    found = answers(corners.bundle(tiny, "faint", target), prompts)
    far = np.abs(found - wanted).max(-1)
    assert np.isfinite(far).all()
    assert far[: 7 if target in ("coreml", "coreai") else None].max() < NEAR[target]


@SESSIONS
@FAMILIES
def test_tokens_at_the_edges_are_sampled_and_fed(corners: Corners, tiny: Tiny, target: str) -> None:
    tokens, edges = [TOKENS[0]], np.array([0, LAST])
    sampler = Sampler(Sampling(temperature=100.0, seed=5))
    with open_session(corners.bundle(tiny, "faint", target), threads=1) as session:
        logits = session.prefill(tokens)
        for _ in range(WINDOW + 4):
            tokens.append(sampler.pick(logits, tokens, edges))
            logits = session.decode(tokens[-1])
    assert set(tokens[1:]) == {0, LAST}
    wanted = expected(corners.model(tiny, "faint", target), [tokens])
    assert np.abs(log_softmax(logits[None]) - wanted).max() < NEAR[target]


@SESSIONS
def test_a_token_beyond_the_vocabulary_is_one_error_and_changes_nothing(
    corners: Corners, target: str
) -> None:
    with open_session(corners.bundle(SHORT_GEMMA3, "faint", target), threads=1) as session:
        session.prefill(TOKENS[:3])
        for token in (LAST + 1, -1, 2**31, 2**63, -(2**63) - 1):
            for feed in (session.prefill, session.score):
                with pytest.raises(SessionError, match=f"^token {token} is outside .* of 96$"):
                    feed([0, token, LAST])
            with pytest.raises(SessionError, match="outside the vocabulary"):
                session.decode(token)
        assert session.tokens == TOKENS[:3]
        logits = session.decode(TOKENS[3])
        assert np.array_equal(logits, fed(session, TOKENS[:3]) * 0 + session.decode(TOKENS[3]))


@TARGETS
@FAMILIES
def test_extreme_logits_and_scores_stay_finite_and_keep_the_best_token(
    corners: Corners, tiny: Tiny, target: str
) -> None:
    """Gemma 2's softcaps are saturated; Gemma 3 has none, and its logits reach 5e4."""
    prompts = [TOKENS[:1], TOKENS[: WINDOW + 1], TOKENS]
    model = corners.model(tiny, "loud", target)
    rows = np.stack([eager_logits(model, prompt).numpy()[-1] for prompt in prompts])
    assert np.abs(rows).max() == pytest.approx(3.0 if tiny is SHORT_GEMMA2 else 5e4, rel=0.5)

    found = answers(corners.bundle(tiny, "loud", target), prompts)

    assert np.isfinite(found).all()
    best = found.argmax(-1)
    lead = rows.max(-1) - rows[np.arange(len(prompts)), best]
    assert (lead <= 0.01 * rows.max(-1)).all()


@SESSIONS
@FAMILIES
def test_extreme_logits_are_sampled_at_every_temperature(
    corners: Corners, tiny: Tiny, target: str
) -> None:
    with open_session(corners.bundle(tiny, "loud", target), threads=1) as session:
        logits = session.prefill(TOKENS)
    assert np.isfinite(logits).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (0.0, 5e-324, 1e-6, 1.0, 1e6, 1e308):
            sampling = Sampling(temperature, top_p=0.95, seed=1)
            token = Sampler(sampling).pick(logits, TOKENS)
            penalized = Sampler(replace(sampling, repetition_penalty=1.2)).pick(logits, TOKENS)
            assert 0 <= min(token, penalized) <= max(token, penalized) <= LAST
            if temperature < 1e-300:
                assert logits[token] == logits.max()


def test_a_float32_target_gives_logits_of_a_billion(corners: Corners) -> None:
    rows = eager_logits(corners.model(SHORT_GEMMA3, "louder", "onnx"), TOKENS).numpy()
    with open_session(corners.bundle(SHORT_GEMMA3, "louder", "onnx"), threads=1) as session:
        found = session.score(TOKENS)
    assert np.abs(rows).max() == pytest.approx(1e9, rel=0.01)
    assert np.abs(found - rows).max() <= 1e-4 * np.abs(rows).max()


@pytest.mark.parametrize("target", HALF)
def test_float16_targets_refuse_logits_that_float16_can_t_hold(
    corners: Corners, target: str
) -> None:
    """They were Inf, and each command that chose a token failed."""
    with pytest.raises(TargetError, match=r"can't return the logits: one of .* exceeds 65504"):
        corners.bundle(SHORT_GEMMA3, "louder", target)


@pytest.mark.parametrize("target", HALF)
@pytest.mark.parametrize(
    ("end", "factor", "quant", "match"),
    [
        ("layers.0.mlp.down_proj.weight", 1e6, "none", r"store .*down_proj\.weight: a value of"),
        ("layers.0.input_layernorm.weight", 1e6, "none", r"store .*input_layernorm\.weight: a"),
        ("layers.1.mlp.down_proj.weight", 3e5, "int4", r"multiply out .*down_proj\.weight: a"),
        ("layers.1.mlp.down_proj.weight", 3e5, "int4-asym", r"multiply out .*down_proj\.weight: a"),
    ],
)
def test_float16_targets_refuse_weights_that_float16_can_t_hold(
    tmp_path: Path, target: str, end: str, factor: float, quant: str, match: str
) -> None:
    """They became Inf, and every logit of the bundle NaN."""
    save(SHORT_GEMMA3, scaled([end], factor), tmp_path / "m")
    with pytest.raises(TargetError, match=f"float16 can't {match}"):
        export(tmp_path / "m", target, quant)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("quant", ["int4", "int4-asym", "int8", "int4-gptq"])
@pytest.mark.parametrize("end", ["layers.0.mlp.down_proj.weight", "embed_tokens.weight"])
def test_weights_beyond_every_scale_are_refused(tmp_path: Path, quant: str, end: str) -> None:
    """They were cut off at the largest scale without a word."""
    save(SHORT_GEMMA3, scaled([end], 1e9), tmp_path / "m")
    recipe, tokens = find_recipe(quant), torch.tensor([TOKENS[:24], TOKENS[16:]])
    work = Workspace(open_folder(tmp_path / "m"), recipe, Calibration("test", tokens))
    build = calibrated_store if recipe.is_calibrated else plain_store
    with pytest.raises(RecipeError, match=rf"{end} has weights .* scales end at 65280"):
        build(work)


def plain_store(work: Workspace) -> QuantizedStore:
    return open_or_build_store(work.checkpoint, work.recipe)


@pytest.mark.parametrize("end", ["layers.0.mlp.down_proj.weight", "embed_tokens.weight"])
def test_a_checkpoint_whose_logits_are_not_finite_is_refused(tmp_path: Path, end: str) -> None:
    """Its export succeeded, and its manifest could not be read."""
    save(SHORT_GEMMA3, scaled([end], 1e38), tmp_path / "m")
    with pytest.raises(CheckpointError, match="its float32 weights give logits that are NaN or"):
        export(tmp_path / "m", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_every_target_that_runs_is_here() -> None:
    assert set(NEAR) == set(BACKENDS) - {"hf"}
