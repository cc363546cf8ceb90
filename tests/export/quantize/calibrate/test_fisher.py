"""Gradients of a model with one layer in memory, compared with those of the whole model."""

import pytest
import torch
from torch import Tensor

from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.decoder import decoder_layer, norm_before, per_layer_parts
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate import fisher, layer_weights
from gemma_export.quantize.calibrate.fisher import (
    backward_layer,
    start_backward,
    store_errors,
    table_information,
)
from gemma_export.quantize.calibrate.flow import RESIDUAL
from gemma_export.quantize.calibrate.workspace import Workspace
from tests.export.conftest import RandomText, only
from tests.export.models import GEMMA4S, TINIES


def _gradient_of_embeddings(work: Workspace, errors: Tensor) -> Tensor:
    """Of the whole model at once, from the gradient with respect to its last residual: (B, T, M).

    Embeddings also change the per-layer embeddings.
    """
    config, tokens = work.checkpoint.config, work.calibration.tokens
    shapes = config.tensor_shapes()
    weights = hold({n: work.checkpoint.rows(n, 0, s[0]) for n, s in shapes.items()})
    ops = BatchOps(tokens, config.rms_norm_eps)
    first = ops.embed(weights["model.embed_tokens.weight"], config.embed_scale).requires_grad_()
    with torch.enable_grad():
        x = first
        parts = per_layer_parts(ops, config, weights.__getitem__, x) if config.per_layer else None
        h = ops.norm(x, weights[norm_before(config, 0)])
        for layer in config.layers:
            part = None if parts is None else ops.columns(parts, layer.index, len(config.kinds))
            x, h = decoder_layer(ops, config, layer, weights.__getitem__, x, h, part)
        x.backward(errors)  # type: ignore[no-untyped-call]
    assert first.grad is not None
    return first.grad


@only(*TINIES, *GEMMA4S)
def test_going_back_layer_by_layer_gives_the_gradient_of_the_whole_model(
    random_text: RandomText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_weights, "product_dtype", lambda device: torch.float32)
    monkeypatch.setattr(fisher, "product_dtype", lambda device: torch.float32)
    work = random_text("int4-gptq", 4)
    config = work.checkpoint.config
    start_backward(work, unheard)
    errors = SafetensorsFile(work.errors.last).rows(RESIDUAL, 0, 4)
    for layer in reversed(config.layers):
        store_errors(work, layer, backward_layer(work, layer)[0])
    (curvature,) = table_information(work)[0].values()

    exact = _gradient_of_embeddings(work, errors)[:, 1:].flatten(0, 1)
    gram = SafetensorsFile(work.errors[0]).rows("gram", 0, config.hidden_size)  # of the head
    expected = exact.T @ exact * (config.embed_scale**2 / len(exact))
    assert torch.allclose(curvature - gram, expected, atol=1e-3 * float(expected.abs().max()))
