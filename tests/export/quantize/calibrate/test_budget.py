"""`--bits`: the chosen formats stay within the budget, lower the loss most, and can be reused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemma_export.formats.format import INT4, INT8, Format
from gemma_export.model.config import PER_LAYER_TABLE, TABLE
from gemma_export.model.sizes import find_official
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter, Tick
from gemma_export.quantize.calibrate.budget import Budget, choose_int8
from gemma_export.quantize.calibrate.curvature import Losses
from gemma_export.quantize.calibrated import peak_bytes
from gemma_export.quantize.recipe import (
    RECIPES,
    bits_per_weight,
    find_recipe,
    load_recipe,
    write_recipe,
)
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.errors import MemoryLimit, RecipeError
from tests.export.conftest import TinyCheckpoint, only
from tests.export.models import GEMMA2

CONFIG = find_official("270m").config
MATRICES = [name for name in RECIPES["int4"].formats(CONFIG) if name != TABLE]


def _losses(table: dict[int, float], others: dict[str, float] | None = None) -> Losses:
    return Losses(dict.fromkeys(MATRICES, 0.01) | (others or {}), table)


@pytest.mark.parametrize("bits", [4.6, 5.9, 7.5])
def test_the_chosen_formats_use_almost_the_whole_budget_and_no_more(bits: float) -> None:
    losses = _losses({0: 1.0})
    chosen = choose_int8(Budget(find_recipe("int4"), bits), CONFIG, losses).formats(CONFIG)
    assert bits - 0.05 < bits_per_weight(CONFIG, chosen) <= bits


def test_the_matrix_with_the_largest_loss_per_weight_gets_int8() -> None:
    worst = "model.layers.3.mlp.down_proj.weight"
    losses = _losses({0: 0.01}, {worst: 0.5})
    chosen = choose_int8(Budget(find_recipe("int4"), 4.6), CONFIG, losses).formats(CONFIG)
    assert chosen[worst] == INT8
    assert chosen[TABLE] == INT4


@pytest.mark.parametrize("table", [0.1, 5.0])
def test_the_table_gets_int8_only_if_that_lowers_the_loss_more_than_layers_would(
    table: float,
) -> None:
    losses = _losses({0: table})
    chosen = choose_int8(Budget(find_recipe("int4"), 7.5), CONFIG, losses).formats(CONFIG)
    assert (chosen[TABLE] == INT8) is (table > 1)


def test_the_table_gets_the_number_of_int8_columns_with_the_smallest_total_loss() -> None:
    losses = _losses({0: 5.0, 128: 1.0, 256: 0.9, 384: 0.1, 512: 0.09})
    budget = Budget(find_recipe("int4-asym-gptq"), 7)
    recipe = choose_int8(budget, CONFIG, losses)
    chosen = recipe.formats(CONFIG)
    assert chosen[TABLE] == Format(4, asymmetric=True, int8_columns=384)
    assert recipe.rule(TABLE).rounding == "gptq"
    int8 = [name for name, fmt in chosen.items() if fmt == INT8]
    assert int8
    assert {recipe.rule(name).rounding for name in int8} == {"gptq"}
    assert 6.9 < bits_per_weight(CONFIG, chosen) <= 7


@pytest.mark.parametrize(("more", "columns"), [(1.2, 384), (2, 512)])
def test_the_int4_loss_of_layers_is_weighted_by_one_and_a_half(more: float, columns: int) -> None:
    budget = Budget(find_recipe("int4-asym-gptq"), 7.5)
    layer_loss: dict[int, float] = {}
    for channels in (384, 512):
        chosen = choose_int8(budget, CONFIG, _losses({channels: 0.0})).formats(CONFIG)
        layer_loss[channels] = 0.01 * sum(chosen[name] != INT8 for name in MATRICES)
    assert 0 < layer_loss[384] < layer_loss[512]
    losses = _losses({384: more * (layer_loss[512] - layer_loss[384]), 512: 0.0})
    assert choose_int8(budget, CONFIG, losses).formats(CONFIG)[TABLE].int8_columns == columns


def test_the_table_of_per_layer_embeddings_counts_with_all_its_weights() -> None:
    """It is half of E2B's: 6.48 bits leave it at 4, and give all others 8."""
    config = find_official("e2b").config
    base = find_recipe("int4-gptq")
    names = [n for n, fmt in base.formats(config).items() if fmt.bits == 4 and n != TABLE]
    losses = Losses(dict.fromkeys(names, 1.0) | {PER_LAYER_TABLE: 0.1}, {0: 1.0})
    chosen = choose_int8(Budget(base, 6.48), config, losses)
    formats = chosen.formats(config)
    assert {n for n, fmt in formats.items() if fmt.bits == 4} == {PER_LAYER_TABLE}
    assert 6.46 < bits_per_weight(config, formats) <= 6.48
    everything = choose_int8(Budget(base, 8.5), config, losses)
    assert set(everything.formats(config).values()) == {INT8}
    assert everything.rule(PER_LAYER_TABLE).rounding == "nearest"


@pytest.mark.parametrize("name", RECIPES)
def test_a_written_recipe_file_loads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    (tmp_path / "r.yaml").write_text(write_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


@only(GEMMA2)
def test_exporting_with_the_recipe_file_of_a_bundle_gives_the_same_codes(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    def export(recipe: str | Path, bits: float | None, name: str) -> str:
        request = ExportRequest(
            targets=("onnx",),
            recipe=load_recipe(recipe) if isinstance(recipe, Path) else find_recipe(recipe),
            checkpoint=str(tiny.folder),
            context_length=64,
            prefill_length=24,
            output=tmp_path / name,
            bits=bits,
        )
        (result,) = export_bundles(request, QuietReporter())
        quantization = result.bundle.manifest.quantization
        assert quantization.bits_per_weight <= 6
        assert {"int4-g32", "int8-g32"} <= set(quantization.tensors.values())
        assert quantization.calibration is not None
        return quantization.codes_digest

    first = export("int4-gptq", 6.0, "first")
    assert export(tmp_path / "first" / "recipe.yaml", None, "again") == first


class _Stages(QuietReporter):
    """Collects the titles of the stages."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Tick]:
        self.titles.append(title)
        with super().stage(title, total_bytes) as tick:
            yield tick


@only(GEMMA2)
def test_a_budget_for_an_uncalibrated_recipe_measures_losses_but_does_not_calibrate(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    """It ran all layers on the calibration text, though the codes do not depend on it."""
    stages = _Stages()
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe("int4"),
        checkpoint=str(tiny.folder),
        context_length=64,
        prefill_length=24,
        output=tmp_path / "first",
        bits=6.0,
    )
    (result,) = export_bundles(request, stages)
    assert "measure" in stages.titles
    assert "calibrate" not in stages.titles
    quantization = result.bundle.manifest.quantization
    assert quantization.calibration is not None
    chosen = load_recipe(tmp_path / "first" / "recipe.yaml")
    assert open_or_build_store(tiny.open(), chosen).codes_digest == quantization.codes_digest


@pytest.mark.parametrize(
    ("recipe", "bits", "match"),
    [
        ("int4", 3.0, "expected 4.5 "),
        ("int4", 9.0, r"to 8.5 \(int8\)"),
        ("mixed", 7.0, "int4 everywhere"),
    ],
)
def test_an_impossible_budget_is_refused(
    tiny: TinyCheckpoint, recipe: str, bits: float, match: str
) -> None:
    request = ExportRequest(
        targets=("onnx",), recipe=find_recipe(recipe), checkpoint=str(tiny.folder), bits=bits
    )
    with pytest.raises(RecipeError, match=match):
        export_bundles(request, QuietReporter())


@pytest.mark.parametrize(("recipe", "bits"), [("int4-gptq", None), ("int4", 6.0)])
def test_an_export_whose_calibration_exceeds_max_ram_is_refused_before_any_work(
    tmp_path: Path, recipe: str, bits: float | None
) -> None:
    """Calibration needs more memory than the export after it."""
    chosen, config = find_recipe(recipe), find_official("2b").config
    needed = peak_bytes(config, chosen, bits)
    request = ExportRequest(
        targets=("onnx",),
        recipe=chosen,
        size="2b",
        checkpoint="random",
        bits=bits,
        max_ram=needed - 1,
        output=tmp_path / "out",
    )
    with pytest.raises(MemoryLimit, match="this export needs about"):
        export_bundles(request, QuietReporter())
    assert not list(tmp_path.iterdir())
