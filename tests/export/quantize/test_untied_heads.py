"""A head apart from the table has its own losses, and is calibrated for its own inputs."""

from dataclasses import replace

import pytest

from gemma_export.formats.codes import dequantize
from gemma_export.formats.format import INT4, INT8
from gemma_export.model.config import HEAD, TABLE
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate.budget import Budget, choose_int8, spend_budget
from gemma_export.quantize.calibrate.curvature import Losses, measure_losses
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.distill import distill as distilling
from gemma_export.quantize.recipe import Recipe, Rule, bits_per_weight, find_recipe
from gemma_export.quantize.round import round_rows
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from tests.export.conftest import (
    RandomText,
    calibrated_store,
    divergence,
    only,
    stages,
    store_divergence,
)
from tests.export.models import GEMMA2, GEMMA3, untied

UNTIED = only(untied(GEMMA2), untied(GEMMA3))


@pytest.fixture
def work(random_text: RandomText) -> Workspace:
    return random_text("int4", 64)


def _calibrated(work: Workspace, recipe: Recipe) -> QuantizedStore:
    return calibrated_store(replace(work, recipe=recipe))


@UNTIED
@pytest.mark.parametrize("name", [TABLE, HEAD])
def test_a_loss_predicts_the_kl_of_rounding_table_or_head_alone(work: Workspace, name: str) -> None:
    losses = measure_losses(work, unheard)
    loss = losses.table[0] if name == TABLE else losses.matrices[HEAD]
    shapes, fmt = work.checkpoint.config.tensor_shapes(), work.formats()[name]
    rows = work.checkpoint.rows(name, 0, shapes[name][0])
    rounded = dequantize(round_rows(rows, fmt, "searched"), fmt)
    kl = divergence(
        work, lambda n: rounded if n == name else work.checkpoint.rows(n, 0, shapes[n][0])
    )
    assert kl / 2.5 < loss < 3 * kl  # the estimate ignores the slope of the final softcap


@UNTIED
def test_calibration_and_distillation_each_lower_the_kl(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling, "PASSES", 4)
    searched = open_or_build_store(work.checkpoint, find_recipe("int4"))
    calibrated = _calibrated(work, find_recipe("int4-gptq"))
    distilled = _calibrated(work, find_recipe("int4-distilled"))
    kl = [store_divergence(work, store) for store in (searched, calibrated, distilled)]
    assert kl[1] < 0.9 * kl[0]
    assert kl[2] < 0.98 * kl[1]


@only(untied(GEMMA2))
def test_only_the_head_may_be_calibrated(work: Workspace) -> None:
    rest = (Rule(TABLE, INT8, "nearest"), Rule("*", INT4))
    gptq = Recipe("head", (Rule(HEAD, INT4, "gptq"), *rest))
    plain = open_or_build_store(work.checkpoint, Recipe("plain", (Rule(HEAD, INT4), *rest)))
    assert store_divergence(work, _calibrated(work, gptq)) < store_divergence(work, plain)


@only(untied(GEMMA2))
def test_a_budget_counts_the_head_and_does_not_raise_it_with_the_table(work: Workspace) -> None:
    config = work.checkpoint.config
    names = [name for name in work.formats() if name != TABLE]
    losses = Losses(dict.fromkeys(names, 1e-6), {0: 5.0})
    budget = Budget(find_recipe("int4"), 5.0)
    chosen = choose_int8(budget, config, losses).formats(config)
    assert (chosen[TABLE], chosen[HEAD]) == (INT8, INT4)
    assert bits_per_weight(config, chosen) <= 5
    losses = Losses({**losses.matrices, HEAD: 9.0}, {0: 1e-6})
    chosen = choose_int8(budget, config, losses).formats(config)
    assert (chosen[TABLE], chosen[HEAD]) == (INT4, INT8)
    budget = Budget(find_recipe("int4-asym-gptq"), 7.5)
    args = (budget, work.checkpoint, work.calibration, stages(unheard))
    recipe = spend_budget(*args, splits_table=True)
    assert recipe.formats(config)[TABLE].int8_columns == 0  # needs a head that is the table
    plain = open_or_build_store(work.checkpoint, find_recipe("int8"))
    assert store_divergence(work, _calibrated(work, recipe)) < 30 * store_divergence(work, plain)
