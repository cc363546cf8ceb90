"""The README says what is there: its flags, its recipes and its tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_every_flag_of_the_table_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    from gemma_export.cli import run

    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    flags = re.findall(r"`(--[a-z-]+)`", _section("## Export"))
    assert len(flags) > 8
    assert [flag for flag in flags if flag not in shown] == []


def test_every_recipe_is_in_the_table() -> None:
    from gemma_export.quantize.recipe import RECIPES

    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", _section("### Recipes"), re.M)) == set(RECIPES)


def test_every_place_of_the_tree_exists() -> None:
    folder = ROOT
    for line in _section("## The house").splitlines():
        if not line.startswith("    "):
            continue
        names = re.findall(r"\S+(?:\.py|/)(?=\s)", line + " ")
        if not line.startswith("      "):
            folder = ROOT / names[0]
            names = names[:1]
        base = ROOT if not line.startswith("      ") else folder
        assert [name for name in names if not (base / name).exists()] == []


def _section(heading: str) -> str:
    start = README.index(heading + "\n")
    level = heading.split()[0]
    after = README[start + len(heading) :]
    return re.split(rf"^#{{2,{len(level)}}} ", after, maxsplit=1, flags=re.M)[0]
