"""Distillation: a smaller KL to the float model, and the same result after an interruption."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import TABLE
from gemma_export.progress import Tick, unheard
from gemma_export.quantize.calibrate.fisher import weigh_table
from gemma_export.quantize.calibrate.layer_weights import load_layer
from gemma_export.quantize.calibrate.layers import (
    calibrate,
    calibrate_table,
    rounded_layer,
)
from gemma_export.quantize.calibrate.stream import pass_layers
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.distill import distill as distilling
from gemma_export.quantize.distill import student
from gemma_export.quantize.distill.candidates import choose_candidates
from gemma_export.quantize.distill.student import Student
from gemma_export.quantize.recipe import Rule, find_recipe
from gemma_export.quantize.round import shared_scale
from gemma_export.quantize.store import QuantizedStore
from tests.export.conftest import (
    RandomText,
    calibrated_store,
    head_inputs,
    only,
    stages,
    store_divergence,
)
from tests.export.models import E2B, GEMMA2, GEMMA4S, TINIES, UNNORMED, save_tiny


@pytest.fixture
def work(random_text: RandomText, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(distilling, "PASSES", 8)
    return random_text("int4-distilled", 16)


def _store(work: Workspace, names: list[str] | None = None) -> QuantizedStore:
    """Build the store; `names` collects the names of the progress ticks."""
    ticks = [] if names is None else names
    return calibrated_store(work, lambda name, done: ticks.append(name))


@only(*TINIES, *UNNORMED, *GEMMA4S)
def test_distillation_lowers_the_kl_and_changes_the_gains(work: Workspace) -> None:
    distilled = _store(work)
    rounded = _store(replace(work, recipe=find_recipe("int4-gptq")))
    assert store_divergence(work, distilled) < 0.95 * store_divergence(work, rounded)
    gain = "model.layers.1.input_layernorm.weight"
    rows = work.checkpoint.config.hidden_size
    assert not torch.equal(distilled.weight(gain).rows(0, rows), rounded.weight(gain).rows(0, rows))


def test_a_student_starts_from_the_calibrated_codes(work: Workspace) -> None:
    weigh_table(work, unheard)
    work = work.arranged()
    calibrate_table(work, unheard)
    calibrate(work, unheard)
    initial, matrix = Student(work), "model.layers.1.mlp.down_proj.weight"
    rounded = rounded_layer(work, 1, load_layer(work.checkpoint, 1))
    assert torch.equal(initial.layer(1)[matrix], rounded[matrix].to(initial.dtype))


@only(GEMMA2)
def test_distillation_changes_int4_codes_but_not_int8_codes(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "CODE_RATE", 0.3)  # high enough for 16 steps
    int8 = Rule("*.up_proj.*", Format(8), "nearest")
    recipe = replace(work.recipe, rules=(int8, *work.recipe.rules))
    work = replace(work, recipe=recipe)
    distilled, rounded = (
        _store(work),
        _store(replace(work, recipe=replace(recipe, distilled=False))),
    )
    for kind, changes in (("up_proj", False), ("down_proj", True), ("q_proj", True)):
        name = f"model.layers.1.{'self_attn' if kind == 'q_proj' else 'mlp'}.{kind}.weight"
        rows = distilled.shapes[name][0]
        codes, before = (s.weight(name).codes(0, rows).codes for s in (distilled, rounded))
        assert torch.equal(codes, before) is not changes


@only(GEMMA2)
def test_distillation_works_with_a_split_table_and_its_factors(
    work: Workspace, tmp_path: Path
) -> None:
    config = copy.deepcopy(GEMMA2.config)
    config.hidden_size = 256
    save_tiny(replace(GEMMA2, config=config), tmp_path / "wide")
    split = Rule(TABLE, Format(4, int8_columns=128), "gptq")
    recipe = replace(work.recipe, rules=(split, *work.recipe.rules))
    work = replace(work, checkpoint=open_checkpoint(str(tmp_path / "wide")), recipe=recipe)
    distilled, rounded = (
        _store(work),
        _store(replace(work, recipe=replace(recipe, distilled=False))),
    )
    assert distilled.weight(TABLE).factors is not None
    assert store_divergence(work, distilled) < 0.95 * store_divergence(work, rounded)


@only(GEMMA2)
def test_learned_scales_are_exact_in_float16_and_bfloat16(work: Workspace) -> None:
    scales = _store(work).weight("model.layers.0.mlp.up_proj.weight").codes(0, 160).scales.float()
    assert torch.equal(scales, shared_scale(scales))


@only(GEMMA2, E2B)
def test_interrupted_distillation_gives_the_same_store(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(name: str, done: int) -> None:
        if name == "step 10":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CalibratedWeights(work, stages(stop)).round_all()
    names: list[str] = []
    resumed = _store(work, names).codes_digest
    assert names[0] == "step 9"  # the state was saved after step 8
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    assert _store(work).codes_digest == resumed


@only(GEMMA2)
def test_progress_of_each_stage_adds_up_to_its_total(work: Workspace) -> None:
    totals: dict[str, int] = {}
    done: dict[str, int] = {}

    @contextmanager
    def stage(title: str, total_bytes: int) -> Iterator[Tick]:
        totals[title], done[title] = total_bytes, 0

        def tick(name: str, size: int) -> None:
            del name
            done[title] += size

        yield tick

    CalibratedWeights(work, stage).round_all()
    assert list(totals) == ["channels", "teacher", "table", "calibrate", "distill"]
    assert done == pytest.approx(totals, rel=0.05)  # gains between layers are counted twice


def test_the_divergence_is_exact_if_every_token_is_a_candidate(work: Workspace) -> None:
    """It is zero for equal inputs."""
    weigh_table(work, unheard)
    work = work.arranged()
    pass_layers(work, work.teacher_residuals, unheard)
    last = work.teacher_residuals.last
    calibrate_table(work, unheard)
    config = work.checkpoint.config
    gain = work.checkpoint.rows("model.norm.weight", 0, config.hidden_size)
    candidates = choose_candidates(work, SafetensorsFile(last), gain)
    assert len(candidates.teacher) == config.vocab_size
    assert (candidates.log_weight == 0).all()
    same = replace(candidates, student=candidates.teacher)
    h = head_inputs(last, config, gain)
    assert float(same.divergence(h, h, torch.float32)) == pytest.approx(0, abs=1e-6)
