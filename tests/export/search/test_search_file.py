"""Search files: one clear line per mistake, and no name that leaves the output folder."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_export.quantize.recipe import RECIPES
from gemma_export.search.cells import Cell
from gemma_export.search.job import Job
from gemma_export.search.question import ask
from gemma_export.search.steps import export_flags
from tests.export.search.searching import BY_WEIGHTS, refusal, write_search

# Keys that are added to a search by weights, and the line that refuses them.
MISTAKES = [
    ({"recipies": "int4"}, "unknown key 'recipies'; expected recipes, "),
    ({"budget": {"memory": 1}}, "budget: unknown key 'memory'; expected "),
    ({"checkpoints": {"chekpoint": "a"}}, "'chekpoint'; expected checkpoint, "),
    ({"targets": "onx"}, "unknown target 'onx'; choose from onnx, "),
    ({"recipes": "int5"}, "unknown recipe 'int5'; choose from int"),
    (
        {"targets": {"target": "onnx", "contxt": 9}},
        "unknown key 'contxt' of onnx; expected c",
    ),
    ({"targets": {"target": "hf", "hf_format": "zip"}}, "--hf-format is 'zip'; choose from"),
    ({"targets": {"target": "onnx", "context": True}}, "context is True; expected a number"),
    ({"context": "long"}, "context: expected `int | list | nothing`, got `str`"),
    ({"cache": "float8"}, "cache is 'float8'; choose from float"),
    ({"checkpoints": {"size": "3b"}}, "unknown size '3b'; choose from "),
    ({"checkpoints": {"family": "gemma3"}}, "neither checkpoint nor size"),
    ({"recipes": {"bits": 6}}, "recipes: give one of quant and file"),
    ({"recipes": {"quant": "auto", "group": 64}}, "group needs a recipe"),
    ({"recipes": {"quant": "int4", "group": 48}}, "group is 48; expected 16, 32, 64, 128 or 256"),
    ({"recipes": "mine.yaml"}, "can't read recipe "),
    ({"recipes": []}, "no cells"),
    ({"context": [64] * 10_000, "prefill": [9] * 10_000}, "more than 1000 cells"),
    ({"context": 10**30}, "expected a number of tokens"),
    ({"recipes": {"quant": "int4-gptq", "bits": -1}}, "bits is -1; expected up to 32"),
    ({"targets": {"target": "onnx", "full_cache": 10**30}}, "expected true or false"),
    ({"budget": {"resident": 10**400}}, "number that is too large"),
    ({"max_ram": 10**400}, "is not an amount of memory"),
    ({"recipes": "~nobody-here/a.yaml"}, "home"),
    ({"objectives": "kl", "text": "a" * 5000}, "does not exist"),
    ({"max_ram": "all"}, "'all' is not an amount of memory"),
    ({"device": "gpu"}, "--device is 'gpu'; expected "),
    ({"max_vram": "4 GiB"}, "--max-vram limits the memory of an accelerator"),
    ({"objectives": "speed"}, "unknown measure 'speed'; choose from "),
    ({"objectives": []}, "objectives is empty"),
    ({"objectives": "score"}, "no tasks are; add tasks"),
    ({"budget": {"resident": "much"}}, "'much' is not an amount of memory"),
    ({"budget": {"decode": -1}}, "budget.decode is -1; expected more"),
    ({"budget": {"kl": float("nan")}}, "budget.kl is nan; expected more"),
    ({"budget": {"top1": 90}}, "expected a share, such as 0.9"),
    ({"bench": {"repeats": 0}}, "bench.repeats is 0; expected 1 or more"),
    ({"objectives": "kl"}, "text is missing; give a file or folder"),
    ({"budget": {"kl": 1}}, "text is missing; give a file or folder"),
    ({"objectives": "kl", "text": "none.txt"}, "none.txt does not exist"),
    ({"objectives": "kl", "text": ".", "calibration": "."}, "text and calibration are the same"),
]
# Files that are not a search at all.
BROKEN = [
    ("targets: onnx\n", "missing required field `checkpoints`"),
    ("checkpoints: a\ncheckpoints: b\ntargets: onnx\n", "'checkpoints' is there twice"),
    ("checkpoints: a\ntargets: [{target: onnx, target: gguf}]\n", "'target' is there twice"),
    ("checkpoints: &a [x]\ntargets: *a\n", "*a is an alias; write out its value"),
    ("checkpoints: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    ("checkpoints: 2026-99-99\n", "month must be in"),
    ('checkpoints: "\\ud800"\ntargets: onnx\n', "half of a surrogate pair"),
    ("checkpoints: [\n", "while parsing"),
    ("- a\n", "expected `mapping`, got `list`"),
    ("\x00", "special characters are not allowed"),
    ("[" * 500_000, "nested too deeply"),
]


@pytest.mark.parametrize(("content", "line"), MISTAKES)
def test_a_mistake_is_told_in_one_line(content: dict[str, Any], line: str, tmp_path: Path) -> None:
    assert line in refusal(write_search(tmp_path, **BY_WEIGHTS | content))


@pytest.mark.parametrize(("text", "line"), BROKEN)
def test_a_file_that_is_no_search_is_told_in_one_line(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(text)
    assert line in refusal(file)


def test_a_file_that_is_missing_huge_or_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    assert "can't read" in refusal(file)
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    assert "more than 1 MiB" in refusal(file)
    file.write_bytes(b"checkpoints: \xff")
    assert "is not UTF-8" in refusal(file)


def test_cells_are_all_combinations_once(tmp_path: Path) -> None:
    file = write_search(
        tmp_path,
        checkpoints=["random:1", {"checkpoint": "random:2", "size": "270m"}],
        targets=["onnx", {"target": "coreml", "coreml_compute": ["gpu", "ane"], "context": 128}],
        recipes=[
            "int4",
            "int4",
            {"quant": "int4", "group": [32, 64]},
            {"quant": "int4-gptq", "bits": [6, 7]},
        ],
        **BY_WEIGHTS | {"context": [64, 128]},
    )
    cells = ask(file).cells
    # int4 with groups of 32 is int4 itself.
    recipes = {"int4", "int4-g64", "int4-gptq-6bits", "int4-gptq-7bits"}
    assert {cell.recipe for cell in cells} == recipes
    assert len(cells) == 2 * len(recipes) * (2 + 2)
    assert len({cell.name for cell in cells}) == len(cells)
    grouped = next(cell.request.recipe for cell in cells if cell.recipe == "int4-g64")
    assert grouped is not None
    assert grouped.rules == RECIPES["int4-g64"].rules


def test_names_are_the_same_for_the_same_choices(tmp_path: Path) -> None:
    names = []
    for folder, recipes in (("a", ["int4"]), ("b", ["int8", "int4"])):
        (tmp_path / folder).mkdir()
        file = write_search(tmp_path / folder, recipes=recipes, **BY_WEIGHTS)
        names.append({cell.name for cell in ask(file).cells})
    assert names[0] < names[1]


@given(st.text(min_size=1).filter(lambda text: text.strip() != "" and text[0] != "~"))
def test_no_name_leaves_the_output_folder(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("search")
    for cell in _cells(folder, text):
        assert cell.name == Path(cell.name).name
        assert cell.name.isascii()
        assert not cell.name.startswith((".", "-"))
        assert len(cell.name) < 200


@pytest.mark.parametrize("text", ["--force", "--output=/tmp/x", "-h"])
def test_a_value_is_never_a_flag(tmp_path: Path, text: str) -> None:
    (cell,) = _cells(tmp_path, text)
    flags = export_flags(cell, Job(cell.name, tmp_path, ()))
    assert f"--checkpoint={text}" in flags
    assert text not in flags


def _cells(folder: Path, checkpoint: str) -> tuple[Cell, ...]:
    return ask(write_search(folder, checkpoints=checkpoint, recipes="int4", **BY_WEIGHTS)).cells
