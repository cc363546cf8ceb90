"""Recipes, rounding, packing and the store."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gemma_export.formats.codes import Codes, dequantize, pack, unpack
from gemma_export.formats.format import INT8, Format
from gemma_export.model.config import PER_LAYER_TABLE, TABLE
from gemma_export.model.sizes import find_official
from gemma_export.quantize.recipe import RECIPES, bits_per_weight, find_recipe, load_recipe
from gemma_export.quantize.round import round_rows, round_weighted, shared_scale
from gemma_export.quantize.store import open_or_build_store, store_path
from gemma_runtime.errors import RecipeError
from tests.export.conftest import TinyCheckpoint

FORMATS = (Format(4), Format(4, asymmetric=True), Format(8), Format(8, asymmetric=True))


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 15))
)
def test_unpacking_packed_codes_gives_the_same_codes(codes: np.ndarray) -> None:
    values = torch.from_numpy(codes)
    packed = pack(values, 4)
    assert packed.shape == (len(codes), (codes.shape[1] + 1) // 2)
    assert torch.equal(unpack(packed, 4, codes.shape[1]), values)


def test_the_first_of_two_codes_is_in_the_low_nibble() -> None:
    assert pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x43]]


@settings(deadline=None)
@given(st.floats(1e-12, 1e9))
def test_a_scale_is_the_same_in_bfloat16_and_float16(scale: float) -> None:
    shared = shared_scale(torch.tensor(scale))
    assert shared > 0
    assert shared.bfloat16().float() == shared == shared.half().float()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "searched"])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), spread=st.floats(1e-2, 100))
def test_the_rounding_error_is_at_most_half_a_step_of_the_full_range(
    fmt: Format, rounding: str, seed: int, spread: float
) -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * spread
    rounded = dequantize(round_rows(rows, fmt, rounding), fmt)  # type: ignore[arg-type]
    groups = rows.view(3, 2, 32)
    error = (groups - rounded.view_as(groups)).pow(2).sum(-1)
    nearest = round_rows(rows, fmt, "nearest")
    limit = (groups - dequantize(nearest, fmt).view_as(groups)).pow(2).sum(-1)
    assert (error <= limit * 1.001 + 1e-12).all()  # a search is never worse than no search
    step = nearest.scales.float()[..., None]
    # Half a step; at the ends of the range, also the error of rounding the scale to eight bits.
    zero = 0.5 * fmt.asymmetric  # the zero point is rounded to a code too
    largest = (0.5 + zero + (1 << fmt.bits) / 256) * step
    assert ((groups - dequantize(nearest, fmt).view_as(groups)).abs() <= largest).all()


@pytest.mark.parametrize("fmt", [INT8, Format(8, per_channel=True, group=64)], ids=str)
def test_weighted_scales_suit_the_columns_that_count_most(fmt: Format) -> None:
    draw = torch.Generator().manual_seed(9)
    rows, power = torch.randn(512, 64, generator=draw), torch.ones(64)
    power[5] = 1e6

    def error(codes: Codes) -> torch.Tensor:
        return (dequantize(codes, fmt) - rows).square()

    nearest, weighted = (
        error(round_rows(rows, fmt, "nearest")),
        error(round_weighted(rows, fmt, power)),
    )
    groups = (512, -1, fmt.group)
    cost = [(squares * power).view(groups).sum(-1) for squares in (weighted, nearest)]
    assert (cost[0] <= cost[1] * 1.001).all()  # a search is never worse than no search
    assert weighted[:, 5].mean() < 0.2 * nearest[:, 5].mean()
    assert weighted.mean() < 1.5 * nearest.mean()  # the others hardly notice


def test_a_group_of_zeros_stays_zero() -> None:
    for fmt in FORMATS:
        block = round_rows(torch.zeros(2, 64), fmt, "searched")
        assert (dequantize(block, fmt) == 0).all()
        assert (block.scales > 0).all()  # some runtimes refuse a scale of zero


def test_bits_per_weight_include_scales_and_zero_points() -> None:
    assert [fmt.bits_per_weight for fmt in FORMATS] == [4.5, 4.625, 8.5, 8.75]
    config = find_official("270m").config
    formats = RECIPES["int4"].formats(config)
    assert bits_per_weight(config, formats) == 4.5


def test_gates_of_per_layer_embeddings_are_int8_unless_a_rule_names_them(tmp_path: Path) -> None:
    """The table of per-layer embeddings, most of the model, is what the recipe says."""
    config = find_official("e2b").config
    small = "model.layers.0.per_layer_projection.weight"
    for recipe in ("int4", "int4-asym", "mixed", "int4-gptq", "mixed-distilled"):
        formats = find_recipe(recipe).formats(config)
        assert {formats[name] for name in formats if ".per_layer_" in name} == {Format(8)}
        assert formats[PER_LAYER_TABLE].bits == 4
        assert find_recipe(recipe).rule(PER_LAYER_TABLE).rounding == "searched"
    assert find_recipe("none").formats(config)[small].is_float
    path = tmp_path / "own.yaml"
    path.write_text(f"base: int4\ntensors:\n  {small}: {{bits: 4}}\n")
    assert load_recipe(path).formats(config)[small] == Format(4)


def test_a_recipe_file_overrides_its_base_by_pattern(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: int4\ntensors:\n  'model.embed_tokens.*': {bits: 8, rounding: nearest}\n"
        "  '*.down_proj.*': {group: 16, asymmetric: true}\n"
    )
    recipe = load_recipe(path)
    formats = recipe.formats(find_official("2b").config)
    assert recipe.name == "mine"
    assert formats[TABLE] == Format(8)
    assert formats["model.layers.0.mlp.down_proj.weight"] == Format(4, 16, asymmetric=True)
    assert formats["model.layers.0.mlp.up_proj.weight"] == Format(4)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("base: int5", "unknown recipe 'int5'; choose from int"),
        ("tensors: {'*': {bits: 5}}", "bits"),
        ("tensors: {'*': {bit: 4}}", "unknown key 'bit'; expected bits, "),
        ("tensor: {}", "unknown key 'tensor'; expected tensors, "),
        ("tensors: [", "while parsing"),
        ("tensors: {'*': {group: 7}}", "group"),
        ("- a", "Expected `object`"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_a_wrong_recipe_file_gives_a_one_line_error(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=match) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_pattern_that_matches_no_matrix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("tensors: {'*.dwon_proj.*': {bits: 8}}")
    with pytest.raises(RecipeError, match="matches no weight matrix"):
        load_recipe(tmp_path / "r.yaml").formats(find_official("2b").config)


def test_a_store_is_built_once_and_its_path_depends_on_source_and_recipe(
    tiny: TinyCheckpoint,
) -> None:
    checkpoint, ticks = tiny.open(), []
    recipe = find_recipe("int4-asym")
    path = store_path(checkpoint, recipe)
    path.unlink(missing_ok=True)
    first = open_or_build_store(checkpoint, recipe, lambda name, done: ticks.append(done))
    assert sum(ticks) == checkpoint.config.parameters * 4
    ticks.clear()
    again = open_or_build_store(checkpoint, recipe, lambda name, done: ticks.append(done))
    assert not ticks
    assert again.codes_digest == first.codes_digest
    assert store_path(checkpoint, find_recipe("int4")) != path


def test_a_store_contains_the_rounded_codes_and_the_exact_gains(tiny: TinyCheckpoint) -> None:
    checkpoint = tiny.open()
    store = open_or_build_store(checkpoint, find_recipe("int4"))
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = store.weight(name)
    values = checkpoint.rows(name, 0, weight.shape[0])
    expected = round_rows(values, Format(4), "searched")
    assert torch.equal(weight.codes(0, weight.shape[0]).codes, expected.codes)
    assert torch.equal(weight.rows(5, 9), dequantize(expected, Format(4))[5:9])
    norm = store.weight("model.norm.weight")
    assert torch.equal(norm.rows(0, 96), checkpoint.rows("model.norm.weight", 0, 96))
