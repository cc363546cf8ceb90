"""Core ML packages of tiny Gemma 4s in our interpreter: shared caches, per-layer embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.manifest import TensorRole
from gemma_runtime.mil.arguments import Result
from gemma_runtime.mil.instructions import Instruction
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.mil.package import MilValue
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint, dequantized, only
from tests.export.models import DENSE, E2B, E4B, GEMMA4S, UNIFIED, WINDOW, eager_logits

pytest.importorskip("coremltools")

TOKENS = np.random.default_rng(4).integers(0, 96, 96).tolist()
# Tolerance in logits: values are rounded to float16 up to twelve layers deep, and attention without
# a scale passes errors on.
NEAR = 0.1

every = only(*GEMMA4S)
edge = only(E2B, E4B)


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", target="coreml", prefill=8)


@every
def test_every_way_to_feed_tokens_is_close_to_float32(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    expected = eager_logits(tiny.model, TOKENS).numpy()
    with open_session(float_bundle) as session:
        figures = compare_logits(session.score(TOKENS), top_logits(expected, 96), NEAR)
        print(figures)
        assert figures.mean_kl <= 1e-4
        assert figures.max_abs < NEAR
        for lengths in ([3, 8, 1, 5, 7, 8, 20, 2, 30], [WINDOW - 1, WINDOW + 1, 3 * WINDOW + 5]):
            session.reset()
            for length in lengths:
                start = session.position
                logits = session.prefill(TOKENS[start : start + length])
                assert np.abs(logits - expected[start + length - 1]).max() < NEAR


def keep_unrounded(
    program: Program, instruction: Instruction, result: Result, values: dict[str, MilValue]
) -> None:
    results = result if isinstance(result, list) else [result]
    for output, value in zip(instruction.outputs, results, strict=True):
        assert value.shape == output.type.shape
        values[output.name] = value


@every
def test_without_rounding_the_graph_gives_the_logits_of_transformers(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float16's noise could hide a small error. Weights that float16 holds, results in float32.

    Only constants and inputs, such as cosines, are rounded.
    """
    model = tiny.tiny.build().half().float()
    model.save_pretrained(tmp_path / "half")
    bundle = export(tmp_path / "half", "none", target="coreml", prefill=8)
    monkeypatch.setattr(Program, "_keep", keep_unrounded)
    expected = eager_logits(model, TOKENS[:70]).numpy()
    with open_session(bundle) as session:
        print(np.abs(session.score(TOKENS[:70]) - expected).max())
