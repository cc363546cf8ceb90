"""Tiny Gemma 4s for targets that compute in float16, and how such targets are compared.

Values of the loud ones exceed float16's maximum, 65504, at one place of the decoder.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from gemma_runtime.bundle import Bundle
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.session import open_session
from tests.export.conftest import TinyCheckpoint
from tests.export.models import SHORT_E2B, WINDOW, Tiny, eager_logits

# By what overflows: ends of weights' names → their factor. E2B's first MLP does, as released.
LOUD: Mapping[str, Mapping[str, float]] = {
    "product of the MLP": {"layers.0.mlp.gate_proj.weight": 300, "layers.0.mlp.up_proj.weight": 99},
    "output of the MLP": {"layers.1.mlp.down_proj.weight": 3e4},
    "product of per-layer embeddings": {
        "layers.0.per_layer_input_gate.weight": 500,
        "per_layer_projection_norm.weight": 300,
    },
    "output of per-layer embeddings": {"layers.3.per_layer_projection.weight": 1.5e4},
    "projection of per-layer embeddings": {"per_layer_model_projection.weight": 8e4},
    "residual": {
        "post_attention_layernorm.weight": 3e4,
        "post_feedforward_layernorm.weight": 3e4,
        "post_per_layer_input_norm.weight": 3e4,
        "per_layer_input_gate.weight": 1e-4,
    },
}


def save_loud_e2b(place: str, folder: Path) -> TinyCheckpoint:
    model = SHORT_E2B.build()
    found = set()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for end in [end for end in LOUD[place] if name.endswith(end)]:
                weight.mul_(LOUD[place][end])
                found.add(end)
    assert found == set(LOUD[place])
    model.save_pretrained(folder)
    return TinyCheckpoint(SHORT_E2B, folder, model)


def save_half(tiny: Tiny, folder: Path) -> PreTrainedModel:
    """The model with weights that float16 holds exactly."""
    model = tiny.build()
    scalars = [x for name, x in model.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for weight in (*model.parameters(), *scalars):
            weight.copy_(weight.half())
    model.save_pretrained(folder)
    return model


def check_every_way(bundle: Bundle, tiny: TinyCheckpoint, tokens: list[int], near: float) -> None:
    """`score`, and `prefill` in chunks of many lengths, give almost the logits of transformers."""
    expected = eager_logits(tiny.model, tokens).numpy()
    with open_session(bundle) as session:
        figures = compare_logits(session.score(tokens), top_logits(expected, 96), near)
        print(figures)
        assert figures.mean_kl <= 1e-4
        assert figures.max_abs < near
        for lengths in ([3, 8, 1, 5, 7, 8, 20, 2, 30], [WINDOW - 1, WINDOW + 1, 3 * WINDOW + 5]):
            session.reset()
            for length in lengths:
                start = session.position
                logits = session.prefill(tokens[start : start + length])
                assert np.abs(logits - expected[start + length - 1]).max() < near
