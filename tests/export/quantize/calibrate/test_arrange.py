"""Permuting channels and scaling columns: the same model, with a smaller rounding error."""

import pytest
import torch
from torch import Tensor

from gemma_export.checkpoint.generation import GenerationDefaults
from gemma_export.formats.codes import dequantize
from gemma_export.formats.format import INT4
from gemma_export.model.config import TABLE, GemmaConfig
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate.arrange import (
    TABLE_DAMPING,
    ArrangedCheckpoint,
    Arrangement,
    arrange_channels,
)
from gemma_export.quantize.calibrate.balance import balanced, balancing_factors
from gemma_export.quantize.calibrate.fisher import weigh_table
from gemma_export.quantize.calibrate.gptq import gptq, prepare
from gemma_export.quantize.calibrate.layer_weights import load_layer
from gemma_export.quantize.calibrate.layers import (
    calibrate,
    calibrate_table,
    rounded_layer,
)
from gemma_export.quantize.calibrate.workspace import Workspace
from tests.export.conftest import RandomText, divergence, only
from tests.export.models import GEMMA4S, TINIES, UNNORMED

EVERY = only(*TINIES, *UNNORMED, *GEMMA4S)

_LARGE = (3, 35, 70, 101)  # channels, in four different groups


@pytest.fixture
def work(random_text: RandomText) -> Workspace:
    return random_text("int4-gptq", 8)


class _LargeChannels:
    """A checkpoint in which some channels are twenty times as large as the others."""

    def __init__(self, config: GemmaConfig) -> None:
        self.config = config
        self.id, self.revision, self.notes = "large-channels", None, ()
        self.generation = GenerationDefaults()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        rows = torch.randn(self.config.tensor_shapes()[name], generator=draw)
        rows[:, _LARGE] *= 20
        return rows[start:stop]

    def digest(self) -> str:
        return "large-channels"

    def tokenizer(self) -> None:
        return None


@EVERY
def test_a_model_with_permuted_channels_gives_the_same_logits(work: Workspace) -> None:
    shapes = work.checkpoint.config.tensor_shapes()
    draw = torch.Generator().manual_seed(5)
    order = torch.randperm(work.checkpoint.config.hidden_size, generator=draw)
    permuted = ArrangedCheckpoint(work.checkpoint, Arrangement(order))
    assert divergence(work, lambda n: permuted.rows(n, 0, shapes[n][0])) < 1e-9
    name = "model.layers.1.mlp.down_proj.weight"
    rows = permuted.rows(name, 0, shapes[name][0])
    assert torch.equal(permuted.rows(name, 5, 9), rows[5:9])
    assert not torch.equal(rows, work.checkpoint.rows(name, 0, shapes[name][0]))


@EVERY
def test_column_factors_of_the_table_do_not_change_the_logits(work: Workspace) -> None:
    config = work.checkpoint.config
    shapes, width = config.tensor_shapes(), config.hidden_size
    draw = torch.Generator().manual_seed(6)
    order, factors = torch.randperm(width, generator=draw), torch.rand(width, generator=draw) + 0.25
    scaled = ArrangedCheckpoint(work.checkpoint, Arrangement(order, factors))

    def read(name: str) -> Tensor:
        return scaled.rows(name, 0, shapes[name][0])

    assert divergence(work, read, factors) < 1e-9
    assert divergence(work, read) > 1e-3
    assert torch.equal(scaled.rows("model.norm.weight", 5, 9), read("model.norm.weight")[5:9])
    assert torch.equal(read(TABLE), work.checkpoint.rows(TABLE, 0, 96)[:, order] * factors)


def test_large_channels_are_placed_in_one_group(work: Workspace) -> None:
    """A large channel sets the scale of its group, so the other 31 channels lose precision."""
    checkpoint = _LargeChannels(work.checkpoint.config)
    order = arrange_channels(checkpoint, {TABLE: torch.eye(128)}, INT4).order
    assert torch.equal(order.sort().values, torch.arange(128))
    groups = [order.tolist().index(channel) // INT4.group for channel in _LARGE]
    assert len(set(groups)) == 1
    rows, inputs = checkpoint.rows(TABLE, 0, 96), prepare(torch.eye(128), TABLE_DAMPING)
    before, after = (
        (dequantize(gptq(r, inputs, INT4), INT4) - r).square().sum()
        for r in (rows, rows[:, order].contiguous())
    )
    assert after < 0.5 * before


@EVERY
def test_balanced_weights_give_the_same_logits(work: Workspace) -> None:
    config = work.checkpoint.config
    shapes = config.tensor_shapes()
    factors: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(2)
    for layer in config.layers:
        weights = load_layer(work.checkpoint, layer.index)
        matrices = [name for name, w in weights.items() if w.dim() == 2]
        powers = {k: torch.rand(k, generator=draw) + 0.01 for k in (128, 160, 320)}
        grams = {n: powers[weights[n].shape[1]].diag() for n in matrices if ".mlp." in n}
        factors |= balancing_factors(layer.index, weights, grams, matrices)
    assert len(factors) == 3 * len(config.kinds)

    def weight(name: str) -> Tensor:
        return balanced(name, work.checkpoint.rows(name, 0, shapes[name][0]), factors)

    assert divergence(work, weight) < 1e-9
    assert not torch.equal(weight("model.layers.0.mlp.up_proj.weight"), weight("model.norm.weight"))


def test_balancing_columns_lowers_the_error_that_inputs_of_unequal_power_see() -> None:
    name, draw = "model.layers.0.mlp.down_proj.weight", torch.Generator().manual_seed(4)
    spread = torch.randn(2, 128, generator=draw)
    rows = torch.randn(64, 128, generator=draw) * torch.exp(0.4 * spread[0])
    gram = torch.exp(2 * spread[1]).diag()
    factors = balancing_factors(0, {name: rows}, {name: gram}, [name])
    scaled = gram / factors[name][:, None] / factors[name]
    balanced_rows = balanced(name, rows, factors)

    def loss(weights: Tensor, power: Tensor) -> float:
        error = dequantize(gptq(weights, prepare(power), INT4), INT4) - weights
        return float(((error @ power) * error).sum())

    assert loss(balanced_rows, scaled) < 0.9 * loss(rows, gram)


@EVERY
def test_the_gains_of_a_rounded_layer_cancel_the_column_factors(work: Workspace) -> None:
    weigh_table(work, unheard)
    work = work.arranged()
    calibrate_table(work, unheard)
    calibrate(work, unheard)
    exact = load_layer(work.checkpoint, 1)
    rounded = rounded_layer(work, 1, exact)
    gain = "model.layers.1.pre_feedforward_layernorm.weight"
    assert not torch.equal(rounded[gain], exact[gain])
    products = (1 + rounded[gain]) * rounded["model.layers.1.mlp.gate_proj.weight"]
    expected = (1 + exact[gain]) * exact["model.layers.1.mlp.gate_proj.weight"]
    assert float((products - expected).norm() / expected.norm()) < 0.15
