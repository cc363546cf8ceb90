"""`--quant auto`: which recipe is chosen for which model and targets, and how to repeat it."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Kind

from gemma_export import ExportRequest, plan_exports
from gemma_export.choose import Needs, choose_recipe, fitted
from gemma_export.cli import run
from gemma_export.formats.format import INT4
from gemma_export.model.config import PER_LAYER_MATRICES
from gemma_export.model.sizes import find_official
from gemma_export.quantize.recipe import Recipe, Rule, find_recipe
from gemma_export.targets import Geometry, load_targets
from gemma_runtime.errors import TargetError
from tests.export.conftest import TinyCheckpoint, only
from tests.export.gguf_files import GEMMA3 as GGUF_GEMMA3
from tests.export.gguf_files import write_tiny
from tests.export.models import GEMMA3

Captured = pytest.CaptureFixture[str]
ANE, VULKAN = {"coreml_compute": "ane"}, {"delegate": "vulkan"}


def chosen(
    size: str,
    *targets: str,
    options: dict[str, str] | None = None,
    bits: float | None = None,
    has_text: bool = True,
) -> str:
    config = find_official(size, None).config
    loaded = load_targets(targets, options or {})
    needs = Needs(config, loaded, Geometry(4096, 1), bits, lambda: has_text, None)
    return choose_recipe(needs).recipe.name


@pytest.mark.parametrize(
    ("targets", "small", "large"),
    [
        (("onnx",), "int8-smooth", "mixed"),
        (("executorch",), "int8-channel-smooth", "int4-table8-channel"),
        (("coreml",), "int8-weighted", "mixed"),
        (("coreai",), "int8-weighted", "mixed"),
        (("gguf",), "int8-smooth", "int4-table8"),
        (("hf",), "int8-weighted", "int4-table8"),
        (("onnx", "coreml"), "int8-weighted", "mixed"),
        (("onnx", "gguf"), "int8-smooth", "int4-table8"),
        (("onnx", "executorch", "coreml", "gguf"), "int4-gptq", "int4"),
    ],
)
def test_targets_and_size_decide(targets: Sequence[str], small: str, large: str) -> None:
    assert chosen("270m", *targets) == small
    assert chosen("2b", *targets) == large


def test_the_gates_of_per_layer_embeddings_get_the_int8_that_the_targets_have() -> None:
    """Unless the recipe has rules for them."""
    config = find_official("e2b").config
    own = Recipe("own", (Rule(PER_LAYER_MATRICES, INT4), Rule("*", INT4)))
    for recipe, targets, wanted in (
        ("int4", ["onnx"], "int8-g32"),
        ("int4", ["executorch"], "int8-channel"),
        ("int4-table8-channel", ["executorch"], "int8-channel"),
        ("int4", ["onnx", "executorch"], "int8-g32"),
        ("int8-channel", ["executorch"], "int8-channel"),
        (own, ["executorch"], "int4-g32"),
    ):
        given = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
        formats = fitted(given, config, load_targets(targets, {})).formats(config)
        gates = {str(f) for name, f in formats.items() if fnmatchcase(name, PER_LAYER_MATRICES)}
        assert gates == {wanted}
    assert fitted(find_recipe("int4"), find_official("1b").config, []) == find_recipe("int4")
    assert chosen("e2b", "executorch", has_text=False) == "int4-table8-channel"


def test_options_of_targets_decide_too() -> None:
    assert chosen("2b", "coreml", options=ANE) == "int8-channel"
    assert chosen("2b", "executorch", options=VULKAN) == "none"


def test_float32_is_never_chosen_for_several_targets() -> None:
    with pytest.raises(TargetError, match=r"no recipe suits all of onnx, coreml .* --quant"):
        chosen("2b", "onnx", "coreml", options=ANE)


def test_without_text_nothing_is_calibrated() -> None:
    assert chosen("270m", "onnx", has_text=False) == "int8"
    assert chosen("270m", "onnx", "executorch") == "int4-gptq"
    assert chosen("270m", "onnx", "executorch", has_text=False) == "int4"
    assert chosen("270m", "onnx", bits=7, has_text=False) == "int4-asym"


def test_gemma4_gets_what_other_large_models_get() -> None:
    """Calibration text runs through it too, so bits to spend bring a calibrated recipe."""
    assert chosen("e2b", "onnx") == "mixed"
    assert chosen("e2b", "onnx", bits=7) == "int4-asym-distilled"


@pytest.mark.parametrize(
    ("target", "bits", "base"),
    [
        ("onnx", 7, "int4-asym-distilled"),
        ("onnx", 7.5, "int4-asym-gptq"),
        ("gguf", 8, "int4-asym-gptq"),
        ("hf", 7, "int4-distilled"),
        ("onnx", 4.55, "int4-distilled"),
    ],
)
def test_bits_get_a_base_that_leaves_some_to_spend(target: str, bits: float, base: str) -> None:
    assert chosen("270m", target, bits=bits) == base


def planned(capsys: Captured, *flags: str) -> tuple[str, str | None]:
    assert run(["--plan", "--json", *flags]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    return plan["recipe"], plan["reason"]


@pytest.mark.parametrize(
    ("target", "kind", "recipe"),
    [
        ("onnx", "Q4_0", "source"),
        ("onnx", "Q8_0", "int8-smooth"),
        ("onnx", "F32", "int8-smooth"),
        ("coreml", "Q8_0", "source"),
        ("gguf", "Q8_0", "source"),
        ("gguf", "F32", "int8-smooth"),
    ],
)
def test_a_small_model_keeps_its_codes_if_they_are_shorter_or_ours_are_not_smooth(
    capsys: Captured, tmp_path: Path, target: str, kind: str, recipe: str
) -> None:
    model = write_tiny(tmp_path, GGUF_GEMMA3, Kind[kind])
    flags = ["--checkpoint", str(model), "--target", target, "--prefill", "16"]
    assert planned(capsys, *flags)[0] == recipe


def test_random_weights_are_planned_as_they_are_exported(capsys: Captured, tmp_path: Path) -> None:
    flags = ["--checkpoint", "random", "--size", "270m"]
    assert planned(capsys, *flags) == ("int8", "in 4 bits a small model loses too much")
    (named,) = plan_exports(ExportRequest(("onnx",), None, "random", "2b"))
    assert named.recipe == "mixed"


def test_a_recipe_of_the_user_has_no_reason(capsys: Captured) -> None:
    assert planned(capsys, "--size", "2b", "--quant", "int4") == ("int4", None)


def exported(capsys: Captured, folder: Path, output: Path, *flags: str) -> dict[str, str]:
    source = ["--checkpoint", str(folder), "--output", str(output), "--context", "48"]
    assert run([*source, "--json", *flags]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    return dict(summary)


@only(GEMMA3)
def test_the_named_recipe_repeats_the_choice(
    capsys: Captured, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    auto = exported(capsys, tiny.folder, tmp_path / "auto")
    named = exported(capsys, tiny.folder, tmp_path / "named", "--quant", auto["recipe"])
    written = ["--recipe", str(tmp_path / "auto" / "recipe.yaml")]
    by_file = exported(capsys, tiny.folder, tmp_path / "file", *written)
    assert auto["reason"] == "in 4 bits a small model loses too much"
    assert named["reason"] is None
    assert auto["codes_digest"] == named["codes_digest"] == by_file["codes_digest"]


def test_the_export_says_what_it_chose_and_why(capsys: Captured, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, GGUF_GEMMA3, Kind.Q4_0)
    flags = ["--checkpoint", str(model), "--output", str(tmp_path / "out"), "--context", "48"]
    assert run(flags) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "recipe source: the checkpoint is quantized, and rounding again would lose more" in shown


def test_exactness_asks_for_the_checkpoint_s_own_codes(capsys: Captured, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, GGUF_GEMMA3, Kind.Q8_0)
    summary = exported(capsys, model, tmp_path / "out", "--require-exact")
    assert summary["recipe"] == "source"
