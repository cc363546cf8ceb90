"""A split table: some columns in int8, the others in int4. Chosen, rounded, exported, read back."""

import copy
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from gemma_export.formats.format import INT4, Format
from gemma_export.model.config import TABLE
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.plan import make_plan
from gemma_export.progress import QuietReporter
from gemma_export.quantize.calibrate.arrange import arrange_channels
from gemma_export.quantize.calibrate.gptq import prepare
from gemma_export.quantize.calibrate.split import prepare_table
from gemma_export.quantize.recipe import Recipe, Rule, bits_per_weight, find_recipe, load_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets import Geometry
from gemma_export.targets.onnx.target import DATA, MODEL, OnnxTarget
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.errors import RecipeError, TargetError
from gemma_runtime.proof.verify import Verdict, verify_bundle
from tests.export.conftest import TinyCheckpoint
from tests.export.models import GEMMA2, save_tiny

SPLIT = Format(4, asymmetric=True, int8_columns=128)
RECIPE = Recipe("split", (Rule(TABLE, SPLIT), *find_recipe("int4-asym").rules))
CALIBRATED = Recipe(
    "split-gptq", (Rule(TABLE, SPLIT, "gptq"), *find_recipe("int4-asym-gptq").rules)
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A tiny Gemma 2 with 256 channels, so that half of them can be int8."""
    config = copy.deepcopy(GEMMA2.config)
    config.hidden_size = 256
    tiny, folder = replace(GEMMA2, config=config), tmp_path_factory.mktemp("wide")
    return TinyCheckpoint(tiny, folder, save_tiny(tiny, folder))


def _export(checkpoint: TinyCheckpoint, output: Path, recipe: Recipe, **more: object) -> Bundle:
    request = ExportRequest(
        targets=("onnx",),
        recipe=recipe,
        checkpoint=str(checkpoint.folder),
        context_length=64,
        prefill_length=24,
        output=output,
    )
    (result,) = export_bundles(replace(request, **more), QuietReporter())  # type: ignore[arg-type]
    return result.bundle


@pytest.mark.parametrize("recipe", [RECIPE, CALIBRATED], ids=lambda recipe: recipe.name)
def test_a_bundle_with_a_split_table_passes_verify_and_contains_both_parts(
    wide: TinyCheckpoint, tmp_path: Path, recipe: Recipe
) -> None:
    bundle = _export(wide, tmp_path / "bundle", recipe)
    assert verify_bundle(bundle, threads=1).verdict is Verdict.PASS
    quantization = bundle.manifest.quantization
    assert codes_digest(bundle) == quantization.codes_digest
    assert quantization.tensors[f"{TABLE}.fine"] == "int8-g32"
    assert quantization.tensors[TABLE] == "int4-g32-asym"
    graph = onnx.load(bundle.directory / MODEL, load_external_data=False).graph
    (scale,) = (tensor for tensor in graph.initializer if tensor.name == f"factor_of_{TABLE}")
    assert list(scale.dims) == ([256] if recipe.is_calibrated else [])
    again = _export(wide, tmp_path / "again", load_recipe(bundle.directory / "recipe.yaml"))
    assert again.manifest.quantization.codes_digest == quantization.codes_digest


def test_the_planned_size_of_a_split_table_is_that_of_the_file(
    wide: TinyCheckpoint, tmp_path: Path
) -> None:
    bundle = _export(wide, tmp_path / "bundle", RECIPE)
    config, target, geometry = wide.open().config, OnnxTarget(), Geometry(64, 24)
    formats = RECIPE.formats(config)
    planned = make_plan(config, "split", formats, target.caches(config, geometry), geometry, "onnx")
    assert 0 <= planned.artifact.total - (bundle.directory / DATA).stat().st_size < 4096
    unsplit = find_recipe("int4-asym").formats(config)
    more = bits_per_weight(config, formats) - bits_per_weight(config, unsplit)
    table, all_ = (
        96 * 256,
        sum(s[0] * s[1] for n, s in config.tensor_shapes().items() if n in unsplit),
    )
    assert more == pytest.approx((8.5 - 4.625) / 2 * table / all_)


def test_rows_of_a_split_table_join_the_int8_and_the_int4_columns(wide: TinyCheckpoint) -> None:
    """The int8 half has a much smaller error than the int4 half."""
    checkpoint = wide.open()
    stored = open_or_build_store(checkpoint, RECIPE).weight(TABLE)
    error = (stored.rows(5, 60) - checkpoint.rows(TABLE, 5, 60)).square().mean(0)
    assert error[:128].max() < 0.05 * error[128:].min()


def test_int8_channels_compensate_the_others(wide: TinyCheckpoint) -> None:
    draw = torch.Generator().manual_seed(4)
    mix = torch.randn(512, 40, generator=draw) @ torch.randn(40, 256, generator=draw)
    curvature = mix.T @ mix + torch.eye(256)
    rows = wide.open().rows(TABLE, 0, 96)
    inputs = prepare_table(TABLE, curvature, SPLIT)

    def loss(rounded: torch.Tensor) -> float:
        error = rounded - rows
        return float(((error @ curvature) * error).sum())

    compensated = inputs.rounded(rows)
    uncompensated = torch.cat((rows[:, :128], compensated[:, 128:]), 1)
    assert loss(compensated) < 0.5 * loss(uncompensated)
    plain = prepare_table(TABLE, curvature, replace(SPLIT, int8_columns=0))
    assert loss(compensated) < 0.1 * loss(plain.rounded(rows))


def test_column_factors_are_larger_for_channels_with_more_curvature(wide: TinyCheckpoint) -> None:
    """The curvature is scaled with them, so an error costs as much as before."""
    curvature = torch.eye(256)
    curvature[7, 7] = 1e4
    arrangement = arrange_channels(wide.open(), {TABLE: curvature}, SPLIT)
    assert arrangement.factors is not None
    column = arrangement.order.tolist().index(7)
    assert column < SPLIT.int8_columns
    others = torch.cat(
        (arrangement.factors[:column], arrangement.factors[column + 1 : SPLIT.int8_columns])
    )
    assert arrangement.factors[column] > 3 * others.max()
    rows = wide.open().rows(TABLE, 0, 96)
    error = torch.randn(96, 256, generator=torch.Generator().manual_seed(7))
    scaled = arrangement.rows(rows + error) - arrangement.rows(rows)
    costs = [
        float(((e @ c) * e).sum())
        for e, c in ((error, curvature), (scaled, arrangement.curvature(curvature)))
    ]
    assert costs[1] == pytest.approx(costs[0], rel=1e-3)
    assert (
        arrange_channels(wide.open(), {TABLE: curvature}, replace(SPLIT, int8_columns=0)).factors
        is None
    )


def test_the_costliest_channels_become_int8(wide: TinyCheckpoint) -> None:
    curvature = torch.eye(256)
    curvature[130:140, 130:140] *= 1000
    order = arrange_channels(wide.open(), {TABLE: curvature}, replace(INT4, int8_columns=128)).order
    assert torch.equal(order.sort().values, torch.arange(256))
    assert set(range(130, 140)) <= set(order[:128].tolist())
    assert prepare(curvature).cost[135] > prepare(curvature).cost[0]


def test_a_budget_can_split_the_table(wide: TinyCheckpoint, tmp_path: Path) -> None:
    bundle = _export(wide, tmp_path / "b", find_recipe("int4-asym-gptq"), bits=4.85)
    assert bundle.manifest.quantization.bits_per_weight <= 4.85
    recipe = load_recipe(bundle.directory / "recipe.yaml")
    assert {rule.format.int8_columns for rule in recipe.rules} <= {0, 128}
    assert verify_bundle(bundle, threads=1).verdict is Verdict.PASS


@pytest.mark.parametrize("target", ["executorch", "coreml", "gguf"])
def test_targets_other_than_onnx_refuse_a_split_table(
    wide: TinyCheckpoint, tmp_path: Path, target: str
) -> None:
    pytest.importorskip({"executorch": "executorch", "coreml": "coremltools"}.get(target, "onnx"))
    with pytest.raises(TargetError, match=r"can't store .*embed_tokens.* as int4"):
        _export(wide, tmp_path / "bundle", RECIPE, targets=(target,), prefill_length=8)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("pattern", "columns"), [(TABLE, 100), (TABLE, 256), ("*down_proj*", 128)], ids=str
)
def test_impossible_numbers_of_int8_columns_are_refused(
    wide: TinyCheckpoint, tmp_path: Path, pattern: str, columns: int
) -> None:
    (tmp_path / "r.yaml").write_text(f"tensors:\n  '{pattern}': {{int8_columns: {columns}}}\n")
    with pytest.raises(RecipeError, match=rf"int8_columns is {columns} for .*, which has \d+"):
        load_recipe(tmp_path / "r.yaml").formats(wide.open().config)


def test_a_group_that_does_not_divide_the_int4_columns_is_refused(
    wide: TinyCheckpoint,
) -> None:
    recipe = replace(
        RECIPE, rules=(Rule(TABLE, Format(4, 256, int8_columns=128)), *RECIPE.rules[1:])
    )
    with pytest.raises(RecipeError, match=r"group 256 does not divide the 128 inputs of .*embed"):
        recipe.formats(wide.open().config)
